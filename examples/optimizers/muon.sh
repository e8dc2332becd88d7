# shellcheck shell=bash disable=SC2034
# Muon as in the paper (section 5): Nesterov momentum 0.95, updates times 0.2 sqrt(max(rows, columns)) (the scale "spectral" is that
# root), weight decay 0.1; for the matrices of the blocks. All else is AdamW's, gates included (docs/mixture.md, "Optimizer").
# Queries, keys and values are three matrices for it, W1 and W2 of a gated layer two (megatron_moa/training/muon.py), as in a LLaMA model.
# With TP it takes each rank's part of a matrix for one (Megatron's default; --muon-tp-mode duplicated takes the whole).
# It is shared out over ranks with PRECISION=bf16 alone (DISTRIBUTED_OPTIMIZER).
OPTIMIZER_ARGS=(
    --optimizer muon
    --muon-momentum 0.95
    --muon-nesterov
    --muon-scale-mode spectral
    --muon-extra-scale-factor 0.2
    --adam-beta1 0.9
    --adam-beta2 0.95
    --adam-eps 1e-8
    --weight-decay 0.1
    --clip-grad 1.0
)
