# The shape of the dense 0.5B model: an array of Megatron flags, to be sourced. Sizes alone, no data, no schedule.
#
#   h 1280, 20 heads of 64, 15 layers, f 4h, vocabulary 32,000: 475,175,680 parameters; MoA adds 14·h·15 = 268,800.
#
# LLaMA-like as the dense 2B model (RMSNorm, RoPE, SwiGLU, no bias, untied embeddings), f = 4h and head size 64. The
# paper's own table of sizes was not at hand: width and depth are this project's choice.
MODEL_ARGS=(
    --num-layers 15
    --hidden-size 1280
    --num-attention-heads 20
    --ffn-hidden-size 5120
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
