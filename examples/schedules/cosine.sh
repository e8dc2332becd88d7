# shellcheck shell=bash disable=SC2034
# Linear warm-up, then half a cosine down to MIN_LR at the last iteration, LR/20 as in the paper: for one token budget, known beforehand.
MIN_LR=${MIN_LR:-$(LC_ALL=C awk -v lr="$LR" 'BEGIN { printf "%g", lr / 20 }')}
SCHEDULE_ARGS=(
    --lr-decay-style cosine
    --lr-decay-iters "$TRAIN_ITERS"
    --lr-warmup-iters "$WARMUP_ITERS"
)
