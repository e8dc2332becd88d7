# shellcheck shell=bash disable=SC2034
# MoE 1B: h 768, 12 heads of 64, 20 layers; experts of f 528, the shared one of 2112.
# All of it is this project's choice; the paper's own table was not at hand.
#
#     python tools/plan.py moe-1b moa --gpus 64 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 1,000,879,872, 319,633,152 of them for a token; the mixture adds 7,096,320, 0.71 %; vocabulary 50,304.
# Hardware: 64 x H100 SXM 80 GB; TP 1, PP 1, DP 64, micro-batch 8; 29.8 GiB a GPU.
# Duration: 39.7 minutes for 20 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 42.3 GPU hours, about $106.
# Watch: load_balancing_loss, which is 1 where all experts get the same; validation loss against the baseline's at
# the same tokens; coefficients of routed and shared experts (moa/... in TensorBoard).

# shellcheck source=examples/families/qwen_moe.sh
source "${BASH_SOURCE[0]%/*}/../families/qwen_moe.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 20
    --hidden-size 768
    --num-attention-heads 12
    --ffn-hidden-size 3072
    --moe-ffn-hidden-size 528
    --moe-shared-expert-intermediate-size 2112
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-20000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-5e-4}
