#!/usr/bin/env bash
# Trains a model with every mixture, learning rate and seed, one after the other, and prints one table of the results.
#
#   DATA_PATH=data/corpus TOKENIZER_MODEL=tokenizer.model MODEL=dense-0.12b examples/sweep.sh
#   MODEL=dense-0.12b MIXINGS='none bi-sided' LRS='1e-3 2e-3' SEEDS=1 examples/sweep.sh --list
#
# --list     print the runs, one a line, and what is known of each
# --run N    only the N-th of them, counted from 0: what an array job calls (examples/slurm/sweep.sbatch)
# --table    only the table
# flags      of pretrain_gpt_moa.py, for every run
# Every mixing, rate and seed is checked before the first run, and by --list.
#
# Variables: MODEL (dense-0.12b), MIXINGS (none la moa), LRS (1e-3 2e-3 4e-3), SEEDS (1 2 3), SWEEP_DIR (runs/sweep-MODEL, with
# FFN=type1 runs/sweep-MODEL-type1), and those of examples/pretrain.sh. Started again it goes on where it was: finished runs are left
# alone, a cut-off one goes on from its last checkpoint. A run whose flags have changed since is refused. Learning rates are what
# arms must be compared at their best of: an untuned comparison says nothing. The paper tries 6e-4 1e-3 2e-3 3e-3 4e-3 5e-3 6e-3.
set -euo pipefail

unset CDPATH # with it cd goes elsewhere, and prints where
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/common.sh
source "$ROOT/examples/common.sh"
MODEL=${MODEL:-dense-0.12b}
read -ra MIXINGS <<<"${MIXINGS:-none la moa}"
read -ra LRS <<<"${LRS:-1e-3 2e-3 4e-3}"
read -ra SEEDS <<<"${SEEDS:-1 2 3}"
SWEEP_DIR=${SWEEP_DIR:-runs/sweep-$(run_name "$MODEL" '')} # with other flags, such as --mock-data, a run is refused

ACTION=all
case ${1:-} in
-h | --help)
    show_help
    exit 0
    ;;
--list | --table) ACTION=${1#--} && shift ;;
--run)
    [[ ${2:-} =~ ^[0-9]{1,9}$ ]] || fail "--run ${2:-}: give the number of a run, from 0; --list shows them"
    ACTION=run ENTRY=$((10#$2))
    shift 2
    ;;
esac

refuse_flag --lr LRS "$@"
refuse_flag --seed SEEDS "$@"
refuse_flag --moa-mixing MIXINGS "$@"

# Learning rates outermost: after a third of the time there is a whole comparison.
RUNS=()
for lr in "${LRS[@]}"; do
    for seed in "${SEEDS[@]}"; do
        for mixing in "${MIXINGS[@]}"; do
            RUNS+=("$mixing $lr $seed")
        done
    done
done

((${#RUNS[@]} > 0)) || fail "MIXINGS, LRS, SEEDS: one of them is empty; leave it out for its default"

# dry_run MIXING LR SEED FLAGS...: what a run would be started with, or why it cannot be, by this script's variables
dry_run() {
    local text code=0 run
    run=$(folder "$1" "$2" "$3")
    # Processes are no part of it, and asking for the GPUs takes time.
    text=$(NPROC_PER_NODE=${NPROC_PER_NODE:-1} LR=$2 SEED=$3 RUN_DIR=$run "$ROOT/examples/pretrain.sh" "$MODEL" "$1" \
        --dry-run "${@:4}" 2>&1) || code=$?
    if [ "$code" != 0 ]; then
        text=${text#pretrain.sh: }
        case $text in "MIXING $1:"* | "LR $2:"* | "SEED $3:"*) text=${text/ /S } ;; esac
        fail "$text"
    fi
    echo "$text"
}

# check FLAGS...: fails where one of the runs could not be started; each mixing, rate and seed is tried once
check() {
    local one
    for one in "${MIXINGS[@]}"; do try "$one" "${LRS[0]}" "${SEEDS[0]}" "$@"; done
    for one in "${LRS[@]:1}"; do try "${MIXINGS[0]}" "$one" "${SEEDS[0]}" "$@"; done
    for one in "${SEEDS[@]:1}"; do try "${MIXINGS[0]}" "${LRS[0]}" "$one" "$@"; done
}
try() { [ -n "$STOPPED" ] || dry_run "$@" >/dev/null; }

# folder MIXING LR SEED
folder() { echo "$SWEEP_DIR/$1-lr$2-seed$3"; }

# state FOLDER: finished, diverged, or how far it is. The log decides: exit code 0 is also that of a run stopped by a time limit of its own,
# and the last iteration need not have a line.
state() {
    local at
    at=$(grep -oE 'iteration +[0-9]+/ *[0-9]+ \|' "$1/train.log" 2>/dev/null | tail -n 1 | tr -dc '0-9/')
    if [ "$(cat "$1/exit_code" 2>/dev/null)" = 17 ]; then
        echo diverged
    elif [ "$(cat "$1/exit_code" 2>/dev/null)" = 0 ] && grep -qsF '[after training is done]' "$1/train.log"; then
        echo finished
    else
        echo "${at:+at $at}"
    fi
}

# train MIXING LR SEED FLAGS...
train() {
    local run command code=0
    run=$(folder "$1" "$2" "$3")
    command=$(dry_run "$@") || return 2
    [[ $command != *"--data-path DATA_PATH "* ]] || fail "DATA_PATH is not set: set it to the prefix of what tools/preprocess_data.py wrote, or add --mock-data"
    [[ $command != *"--tokenizer-model TOKENIZER_MODEL "* ]] || fail "TOKENIZER_MODEL is not set: set it to the file of tools/train_tokenizer.py"
    # Where it runs may change between two starts; what it trains may not.
    command=${command#*pretrain_gpt_moa.py}
    if [ -e "$run/command" ] && [ "$command" != "$(cat "$run/command")" ]; then
        fail "$run: was begun with other flags ($(diff <(cat "$run/command") - <<<"$command" | grep -m 1 '^>' | tr -s ' \\>' ' ') is new); set another SWEEP_DIR, or delete that folder"
    fi
    case $(state "$run") in finished | diverged) return 0 ;; esac
    [ -z "$STOPPED" ] || return 75 # told to stop before there was a run to pass it on to
    mkdir -p "$run"
    echo "$command" >"$run/command"
    echo "> $run"
    # In the background and waited for, so that a signal is passed on at once and the run can save.
    LR=$2 SEED=$3 RUN_DIR=$run "$ROOT/examples/pretrain.sh" "$MODEL" "$1" "${@:4}" >>"$run/train.log" 2>&1 &
    CHILD=$!
    [ -z "$STOPPED" ] || pass_on USR2 "$CHILD" # the same, a moment later
    wait "$CHILD" || code=$?
    while [ -n "$STOPPED" ] && kill -0 "$CHILD" 2>/dev/null; do
        code=0
        wait "$CHILD" || code=$?
    done
    # Where a signal interrupts bash's wait just as the run ends, bash gives the signal's code or -1 for the run's.
    [ -z "$STOPPED" ] || case $code in 140 | 143 | 255) code=75 ;; esac
    echo "$code" >"$run/exit_code"
    case $code in
    0) ;;
    17) echo "> $run: diverged" ;;
    *) echo "sweep.sh: $run: ended with exit code $code: $(tail -n 1 "$run/train.log")" >&2 ;;
    esac
    return "$code"
}

CHILD='' STOPPED=''
stop() {
    STOPPED=1
    [ -z "$CHILD" ] || pass_on "$1" "$CHILD"
}
trap 'stop TERM' TERM INT
trap 'stop USR2' USR2

table() { "${PYTHON:-python}" "$ROOT/tools/tabulate_runs.py" "$SWEEP_DIR"; }

case $ACTION in
list)
    check "$@"
    for index in "${!RUNS[@]}"; do
        read -ra run <<<"${RUNS[$index]}"
        path=$(folder "${run[@]}")
        printf '%3d  %-48s  %s\n' "$index" "$path" "$(state "$path")"
    done
    ;;
table) table ;;
run)
    ((ENTRY < ${#RUNS[@]})) || fail "--run $ENTRY: there are ${#RUNS[@]} runs, 0 to $((${#RUNS[@]} - 1))"
    read -ra run <<<"${RUNS[$ENTRY]}"
    train "${run[@]}" "$@"
    ;;
all)
    check "$@"
    for entry in "${RUNS[@]}"; do
        read -ra run <<<"$entry"
        code=0
        train "${run[@]}" "$@" || code=$?
        case $code in 0 | 17) ;; *) exit "$code" ;; esac
    done
    table
    ;;
esac
