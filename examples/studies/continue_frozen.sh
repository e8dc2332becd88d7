#!/usr/bin/env bash
# Trains a MoA on in three ways: as it is; with its gates frozen (they still depend on the token); collapsed to LA, with
# every gate replaced by its mean over the training data. Is learning on in the gates, or their variation, worth anything?
#
#   DATA_PATH=data/corpus LR=2e-4 examples/studies/continue_frozen.sh runs/dense-0.12b-moa/checkpoints
#
# CHECKPOINT  of a MoA, what training's --save named
# flags       of pretrain_gpt_moa.py, for every training: they come last, so they win. --dry-run prints the commands and runs
#             nothing.
#
# All three are on equal terms: the same weights, a new optimizer (Megatron finds parameter groups in a checkpoint by their
# settings, and frozen gates have none), the same schedule from its warm-up on, and per seed the same data in the same order.
# Ends in JSON lines, a training each, which it also writes to OUT/continued.jsonl for tools/analyze_gates.py --continued.
# Started again it goes on: what has ended is left alone. OUT/settings keeps trainings of other settings out of OUT.
#
# Variables: DATA_PATH and LR, which have no default; ITERATIONS (200), BATCH (16), SEEDS (1 2 3), SPLIT (99,1,0: give the
#   checkpoint's own, or it is measured on what it was trained on), OUT (runs/continued), EVAL_ITERS (40), PYTHON (python)
set -euo pipefail

unset CDPATH # with it cd goes elsewhere, and prints where
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=examples/common.sh
source "$ROOT/examples/common.sh"

case ${1:-} in -h | --help)
    show_help
    exit 0
    ;;
esac
[ $# -ge 1 ] && [[ $1 != -* ]] || fail "needs a CHECKPOINT, such as: $0 runs/dense-0.12b-moa/checkpoints; --help says more"
CHECKPOINT=$1
shift
[ -n "${DATA_PATH:-}" ] || fail "DATA_PATH is not set: set it to the prefix of what tools/preprocess_data.py wrote"
[ -n "${LR:-}" ] || fail "LR is not set: set it to the peak learning rate of training on, such as LR=4e-4"
ITERATIONS=${ITERATIONS:-200} BATCH=${BATCH:-16} SPLIT=${SPLIT:-99,1,0} EVAL_ITERS=${EVAL_ITERS:-40}
OUT=${OUT:-runs/continued} PYTHON=${PYTHON:-python}
is_whole 9 ITERATIONS
read -ra SEEDS <<<"${SEEDS:-1 2 3}"
refuse_flag --lr LR "$@"
refuse_flag --seed SEEDS "$@"
refuse_flag --train-iters ITERATIONS "$@"
refuse_flag --data-path DATA_PATH "$@"

FLAGS=() DRY_RUN=''
for flag in "$@"; do
    if [ "$flag" = --dry-run ]; then DRY_RUN=1; else FLAGS+=("$flag"); fi
done

# run LOG COMMAND...: runs a command, its output in a file, or prints it
run() {
    local log=$1 code=0
    shift
    if [ -n "$DRY_RUN" ]; then
        print_command "$@"
        return
    fi
    "$@" >"$log" 2>&1 || code=$?
    [ "$code" = 0 ] || fail "$log: ended with exit code $code: $(tail -n 1 "$log")"
}

# All that trainings which are paired must have alike.
SETTINGS=$(printf '%s\n' "CHECKPOINT $CHECKPOINT" "DATA_PATH $DATA_PATH" "LR $LR" "ITERATIONS $ITERATIONS" "BATCH $BATCH" \
    "SPLIT $SPLIT" "EVAL_ITERS $EVAL_ITERS" "flags ${FLAGS[*]}")
if [ -e "$OUT/la-start" ] || [ -e "$OUT/settings" ]; then
    [ -e "$OUT/settings" ] || fail "OUT $OUT: has no file settings, so what it holds cannot be gone on with; take another OUT"
    began=$(diff "$OUT/settings" - <<<"$SETTINGS" | sed -n 's/^< //p' | head -n 1) || true
    [ -z "$began" ] || fail "OUT $OUT: was begun with $began; give that again, or take another OUT"
fi
[ -n "$DRY_RUN" ] || { mkdir -p "$OUT" && echo "$SETTINGS" >"$OUT/settings"; }
if [ ! -d "$OUT/la-start" ]; then
    run "$OUT/la-start.log" "$PYTHON" "$ROOT/tools/analyze_gates.py" "$CHECKPOINT" "$DATA_PATH" \
        --part training --no-ablate --write-la "$OUT/la-start"
fi

for seed in "${SEEDS[@]}"; do
    for way in gates frozen la; do
        folder=$OUT/$way-seed$seed
        [ ! -e "$folder/ended" ] || continue
        WAY_ARGS=(--pretrained-checkpoint "$CHECKPOINT")
        [ "$way" != frozen ] || WAY_ARGS+=(--moa-freeze-gates)
        [ "$way" != la ] || WAY_ARGS=(--pretrained-checkpoint "$OUT/la-start")
        [ -n "$DRY_RUN" ] || { rm -rf "$folder" && mkdir -p "$folder"; }
        run "$folder/train.log" "$PYTHON" "$ROOT/pretrain_gpt_moa.py" "${WAY_ARGS[@]}" --use-checkpoint-args \
            --micro-batch-size "$BATCH" --global-batch-size "$BATCH" --train-iters "$ITERATIONS" \
            --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-iters $(((ITERATIONS + 19) / 20)) \
            --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed "$seed" \
            --data-path "$DATA_PATH" --split "$SPLIT" --data-cache-path "$folder/cache" \
            --log-interval 10 --eval-interval $((ITERATIONS + 1)) --eval-iters "$EVAL_ITERS" "${FLAGS[@]}"
        [ -n "$DRY_RUN" ] || touch "$folder/ended"
    done
done
[ -n "$DRY_RUN" ] || exec "$PYTHON" -m megatron_moa.research.gates.continued "$OUT"
