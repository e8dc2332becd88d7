# The shape of the dense 134M model: an array of Megatron flags, to be sourced. Sizes alone, no data, no schedule.
#
#   h 768, 12 heads of 64, 6 layers, f 4h, vocabulary 32,000: 105,785,088 parameters; MoA adds 14·h·6 = 64,512.
#   With GPT-2's vocabulary, padded to 50,304, it has 133,900,032: what the name stands for.
#
# LLaMA-like as the dense 2B model (RMSNorm, RoPE, SwiGLU, no bias, untied embeddings), f = 4h and head size 64. The
# paper's own table of sizes was not at hand: width and depth are this project's choice.
MODEL_ARGS=(
    --num-layers 6
    --hidden-size 768
    --num-attention-heads 12
    --ffn-hidden-size 3072
    --swiglu
    --normalization RMSNorm
    --position-embedding-type rope
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --seq-length 1024
    --max-position-embeddings 1024
    --hidden-dropout 0
    --attention-dropout 0
)
