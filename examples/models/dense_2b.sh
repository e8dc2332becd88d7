# The shape of the dense 2B model: an array of Megatron flags, to be sourced. Sizes alone, no data, no schedule.
#
#   h 2048, 32 heads of 64, 28 layers, f 4h, vocabulary 32,000: 2,010,236,928 parameters; MoA adds 14·h·28 = 802,816.
#
# LLaMA-like (RMSNorm, RoPE, SwiGLU, no bias, untied embeddings), f = 4h and head size 64 as in the code of the paper's
# group (arXiv 2502.19002). The paper's own table of sizes was not at hand: width and depth are this project's choice.
MODEL_ARGS=(
    --num-layers 28
    --hidden-size 2048
    --num-attention-heads 32
    --ffn-hidden-size 8192
    --swiglu
    --normalization RMSNorm
    --position-embedding-type rope
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --seq-length 2048
    --max-position-embeddings 2048
    --hidden-dropout 0
    --attention-dropout 0
)
