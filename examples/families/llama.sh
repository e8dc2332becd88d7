# shellcheck shell=bash disable=SC2034
# What all LLaMA-like models share: RMSNorm, RoPE, gated feed-forward layers (SwiGLU or a mixture in its place), no
# biases, untied embeddings, no dropout. Head size 64 and f = 4h are in the models' own files.
FAMILY_ARGS=(
    --swiglu
    --normalization RMSNorm
    --position-embedding-type rope
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --hidden-dropout 0
    --attention-dropout 0
)
