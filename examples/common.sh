# shellcheck shell=bash
# What the scripts of this folder share; they source it.

# fail MESSAGE: one line, exit code 2
fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# is_switch NAME...: fails where a variable is neither 0, 1 nor empty
is_switch() {
    local name
    for name in "$@"; do
        case ${!name:-0} in 0 | 1) ;; *) fail "$name ${!name}: neither 0 nor 1; take 1 to turn it on" ;; esac
    done
}

declare -A GIVEN_BY # by variable: the trailing flag that gave its value, if one did

# is_set NAME...: fails where a variable is empty that a model's file has to set
is_set() {
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] ||
            fail "$name is not set: ${MODEL_FILE:-the model} has no value for it; add one, or set it before the command"
    done
}

# is_whole DIGITS NAME...: fails where a variable is no whole number of so many digits, with which bash reckons exactly
is_whole() {
    local name whole="^[1-9][0-9]{0,$(($1 - 1))}$"
    for name in "${@:2}"; do
        is_set "$name"
        [[ ${!name} =~ $whole ]] ||
            fail "${GIVEN_BY[$name]:-$name} ${!name}: not a whole number above 0 and below 10^$1; write it as 128"
    done
}

# refuse_flag FLAG VARIABLE WORD...: fails where a trailing flag sets what the script sets by a variable
refuse_flag() {
    local word
    for word in "${@:3}"; do
        [ "${word%%=*}" != "$1" ] || fail "$1: is set by $2 here; set that, and leave the flag out"
    done
}

# pass_on SIGNAL PID: a second later, since a child that bash has just made loses signals until it is another program
pass_on() {
    sleep 1
    kill -s "$1" "$2" 2>/dev/null || true
}

# show_help: the comment at the head of the script
show_help() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; }

# run_name MODEL MIXING FLAG...: what a run is called, with its folder in runs/; MIXING may be empty
run_name() {
    local name
    name=$(basename "$1" .sh)
    [ "${FFN:-type2}" = type2 ] || name+=-$FFN
    name+=${2:+-$2}
    # What random tokens have trained is nothing that a run on text may go on with.
    case " ${*:3} " in *' --mock-data '*) name+=-mock ;; esac
    echo "$name"
}

# print_command WORD...: a command as one could type it, a flag a line
print_command() {
    local word separator=''
    for word in "$@"; do
        [[ $word != --* ]] || separator=$' \\\n    '
        printf '%s%q' "$separator" "$word"
        separator=' '
    done
    echo
}
