# shellcheck shell=bash disable=SC2034
# MoE 0.25B: h 384, 6 heads of 64, 18 layers; experts of f 264, the shared one of 1056.
# All of it is this project's choice; the paper's own table was not at hand.
#
#     python tools/plan.py moe-0.25b moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 246,567,552, 93,287,040 of them for a token; the mixture adds 3,193,344, 1.30 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 8; 17.4 GiB a GPU.
# Duration: 22.5 minutes for 5 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 3 GPU hours, about $7.
# Watch: load_balancing_loss, which is 1 where all experts get the same; validation loss against the baseline's at
# the same tokens; coefficients of routed and shared experts (moa/... in TensorBoard).

# shellcheck source=examples/families/qwen_moe.sh
source "${BASH_SOURCE[0]%/*}/../families/qwen_moe.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 18
    --hidden-size 384
    --num-attention-heads 6
    --ffn-hidden-size 1536
    --moe-ffn-hidden-size 264
    --moe-shared-expert-intermediate-size 1056
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-5000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256} # samples: 0.5 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-8e-4}
