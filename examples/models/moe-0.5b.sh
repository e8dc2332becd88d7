# shellcheck shell=bash disable=SC2034
# MoE 0.5B: h 512, 8 heads of 64, 24 layers; experts of f 352, the shared one of 1408.
# All of it is this project's choice; the paper's own table was not at hand.
#
#     python tools/plan.py moe-0.5b moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 544,248,320, 180,916,736 of them for a token; the mixture adds 5,677,056, 1.04 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 8; 24.8 GiB a GPU.
# Duration: 1.53 hours for 10 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 12.2 GPU hours, about $31.
# Watch: load_balancing_loss, which is 1 where all experts get the same; validation loss against the baseline's at
# the same tokens; coefficients of routed and shared experts (moa/... in TensorBoard).

# shellcheck source=examples/families/qwen_moe.sh
source "${BASH_SOURCE[0]%/*}/../families/qwen_moe.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 24
    --hidden-size 512
    --num-attention-heads 8
    --ffn-hidden-size 2048
    --moe-ffn-hidden-size 352
    --moe-shared-expert-intermediate-size 1408
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-10000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256} # samples: 0.5 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-6e-4}
