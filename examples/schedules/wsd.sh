# shellcheck shell=bash disable=SC2034
# Warm-up, stable, decay: constant after the warm-up until the last DECAY_PERCENT (20) of the iterations, then
# linearly down to MIN_LR; 20 % and 0 are the paper's. Going on from a checkpoint of the stable phase with more TOKENS (a copy of it as
# RUN_DIR/checkpoints, and --override-opt-param-scheduler) gives a longer budget for the price of its own decay.
MIN_LR=${MIN_LR:-0} DECAY_PERCENT=${DECAY_PERCENT:-20}
[[ $DECAY_PERCENT =~ ^([1-9][0-9]?|100)$ ]] || fail "DECAY_PERCENT $DECAY_PERCENT: not a whole number from 1 to 100; leave it out for 20"
DECAY_ITERS=$((TRAIN_ITERS * DECAY_PERCENT / 100))
SCHEDULE_ARGS=(
    --lr-decay-style WSD
    --lr-wsd-decay-style linear
    --lr-decay-iters "$TRAIN_ITERS"
    --lr-wsd-decay-iters "$((DECAY_ITERS > 0 ? DECAY_ITERS : 1))"
    --lr-warmup-iters "$WARMUP_ITERS"
)
