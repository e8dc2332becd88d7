# shellcheck shell=bash disable=SC2034
# AdamW, as the paper's group trains (arXiv 2502.19002): betas 0.9 and 0.95, weight decay 0.1, gradients clipped to 1.
OPTIMIZER_ARGS=(
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --adam-eps 1e-8
    --weight-decay 0.1
    --clip-grad 1.0
)
