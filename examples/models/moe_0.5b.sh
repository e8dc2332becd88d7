# The shape of the MoE 0.5B model: an array of Megatron flags, to be sourced. Sizes alone, no data, no schedule.
#
#   h 512, 8 heads of 64, 24 layers; 32 routed experts of f 352, 4 a token, and a shared one of f 1408 behind a
#   sigmoid gate; vocabulary 32,000: 525,505,024 parameters, 0.16 billion of them used by a token; MoA adds
#   14·h·24·33 = 5,677,056.
#
# The MoE 2B model at half its width, in the style of Qwen2-MoE as that one. The paper's own table of sizes was not at
# hand: width, depth and number of experts are this project's choice.
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 512
    --num-attention-heads 8
    --ffn-hidden-size 2048
    --num-experts 32
    --moe-router-topk 4
    --moe-router-pre-softmax
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-ffn-hidden-size 352
    --moe-shared-expert-intermediate-size 1408
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
