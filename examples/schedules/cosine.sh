# shellcheck shell=bash disable=SC2034
# Linear warm-up, then half a cosine down to MIN_LR at the last iteration: for one token budget, known beforehand.
SCHEDULE_ARGS=(
    --lr-decay-style cosine
    --lr-decay-iters "$TRAIN_ITERS"
    --lr-warmup-iters "$WARMUP_ITERS"
)
