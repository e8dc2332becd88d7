# shellcheck shell=bash
# Waiting for a process while signals come; sourced by job.sh and node.sh.

# The trap of a stop signal calls this: what the signal interrupts is waited for again.
SIGNALLED=''

# await PID: returns its exit code, not that of a wait which a signal has interrupted
await() {
    local code
    while
        SIGNALLED='' code=0
        wait "$1" || code=$?
        [ -n "$SIGNALLED" ]
    do :; done
    return "$code"
}
