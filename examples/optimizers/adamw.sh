# shellcheck shell=bash disable=SC2034
# AdamW as in the paper (section 5): betas 0.9 and 0.95, weight decay 0.1, gradients clipped to 1. Epsilon is ours.
OPTIMIZER_ARGS=(
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --adam-eps 1e-8
    --weight-decay 0.1
    --clip-grad 1.0
)
