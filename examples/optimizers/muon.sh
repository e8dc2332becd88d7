# shellcheck shell=bash disable=SC2034
# Muon for the matrices between embedding and output layer, Adam for all else, gates included (docs/mixture.md, "Optimizer").
# An update of spectral scale times 0.2 has about the size of AdamW's, so AdamW's learning rate is the place to start.
# Needs `pip install emerging-optimizers==0.3.0`; sharing it out over ranks needs PRECISION=bf16.
OPTIMIZER_ARGS=(
    --optimizer muon
    --muon-momentum 0.95
    --muon-nesterov
    --muon-scale-mode spectral
    --muon-extra-scale-factor 0.2
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
)
