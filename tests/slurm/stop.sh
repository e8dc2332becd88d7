#!/usr/bin/env bash
# Stops the Slurm that start.sh started in FOLDER, and the jobs it runs. Logs and state stay.
set -euo pipefail

if [ $# != 1 ] || [ ! -e "$1/slurm.conf" ]; then
    echo "stop.sh: needs the FOLDER that start.sh was given" >&2
    exit 2
fi
unset CDPATH # with it cd goes elsewhere, and prints where
FOLDER=$(cd "$1" && pwd)
export SLURM_CONF=$FOLDER/slurm.conf

# Jobs first, while someone is there who can end them.
if [ -e "$FOLDER/slurmctld.pid" ]; then
    timeout 10 scancel --signal=KILL --full --state=RUNNING --quiet 2>/dev/null || true
    timeout 10 scancel --state=PENDING --quiet 2>/dev/null || true
    for ((second = 0; second < 20; second++)); do
        [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break
        sleep 1
    done
fi
for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
    pid=$(cat "$FOLDER/$daemon.pid" 2>/dev/null) || continue
    # A pid file may have outlived its daemon; the process must be one of this folder's.
    if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$FOLDER/"; then
        kill "$pid"
        for ((tenth = 0; tenth < 100; tenth++)); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.1
        done
        kill -9 "$pid"
    fi
done
rm "$FOLDER/slurm.conf"
