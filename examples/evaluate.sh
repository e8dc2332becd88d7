#!/usr/bin/env bash
# Evaluates an export on the benchmarks that papers on pretraining report, zero-shot, with lm-evaluation-harness.
#
#   examples/evaluate.sh EXPORT [TASK...] [flags]
#
#   examples/evaluate.sh exports/dense-0.5b-moa                               # HellaSwag, ARC, OpenBookQA, WinoGrande, PIQA
#   DATA=benchmarks examples/evaluate.sh exports/dense-0.5b-moa hellaswag     # without the hub: files in benchmarks/hellaswag
#   DATA=benchmarks examples/evaluate.sh exports/dense-0.5b-moa heldout_text  # a task of examples/evaluation
#
# EXPORT  what tools/convert_to_hf.py wrote, or another Hugging Face folder; no code in it is run
# TASK    of the harness, or of examples/evaluation; docs/evaluation.md says how DATA is laid out
# flags   of tools/evaluate.py: they come last, so they win. --dry-run prints the command and runs nothing.
#
# Variables, all optional: DATA (the hub)  OUT (EXPORT/evaluation)  NUM_FEWSHOT (0)  BATCH_SIZE (8)  LIMIT (all)
#   TASKS_FOLDER (further tasks of yours)  PYTHON (python)
set -euo pipefail

unset CDPATH # with it cd goes elsewhere, and prints where
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/common.sh
source "$ROOT/examples/common.sh"

case ${1:-} in -h | --help)
    show_help
    exit 0
    ;;
esac
[ $# -ge 1 ] || fail "needs an EXPORT, such as: examples/evaluate.sh exports/dense-0.5b-moa; --help says more"
EXPORT=$1
shift

TASKS=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
    TASKS+=("$1")
    shift
done
FLAGS=() DRY_RUN=''
for flag in "$@"; do
    if [ "$flag" = --dry-run ]; then DRY_RUN=1; else FLAGS+=("$flag"); fi
done

COMMAND=("${PYTHON:-python}" "$ROOT/tools/evaluate.py" --load "$EXPORT")
[ ${#TASKS[@]} = 0 ] || COMMAND+=(--tasks "${TASKS[@]}")
COMMAND+=(
    ${DATA:+--data "$DATA"}
    ${OUT:+--out "$OUT"}
    ${NUM_FEWSHOT:+--num-fewshot "$NUM_FEWSHOT"}
    ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"}
    ${LIMIT:+--limit "$LIMIT"}
    ${TASKS_FOLDER:+--tasks-folder "$TASKS_FOLDER"}
    "${FLAGS[@]}"
)

if [ -n "$DRY_RUN" ]; then
    print_command "${COMMAND[@]}"
    exit 0
fi
exec "${COMMAND[@]}"
