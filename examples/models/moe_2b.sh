# The shape of the MoE 2B model: an array of Megatron flags, to be sourced. Sizes alone, no data, no schedule.
#
#   h 1024, 16 heads of 64, 24 layers; 32 routed experts of f 704, 4 a token, and a shared one of f 2816 behind a
#   sigmoid gate; vocabulary 32,000: 2,035,622,912 parameters, 0.58 billion of them used by a token; MoA adds
#   14·h·24·33 = 11,354,112.
#
# LLaMA-like (RMSNorm, RoPE, SwiGLU, no bias, untied embeddings) with experts in the style of Qwen2-MoE: routed experts
# narrow (f 0.6875 h), the shared one four times as wide, probabilities not rescaled after the choice. The paper's own
# table of sizes was not at hand: width, depth and number of experts are this project's choice.
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --ffn-hidden-size 4096
    --num-experts 32
    --moe-router-topk 4
    --moe-router-pre-softmax
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-ffn-hidden-size 704
    --moe-shared-expert-intermediate-size 2816
    --moe-shared-expert-gate
    --moe-token-dispatcher-type alltoall
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
