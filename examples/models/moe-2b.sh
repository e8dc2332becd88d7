# shellcheck shell=bash disable=SC2034
# MoE 2B: h 1024, 16 heads of 64, 24 layers; experts of f 704, the shared one of 2816.
# All of it is this project's choice; the paper's own table was not at hand.
#
#     python tools/plan.py moe-2b moa --gpus 64 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 2,073,109,504, 619,783,168 of them for a token; the mixture adds 11,354,112, 0.55 %; vocabulary 50,304.
# Hardware: 64 x H100 SXM 80 GB; TP 1, PP 1, EP 4, DP 64, micro-batch 4; 23.5 GiB a GPU.
# Duration: 2.87 hours for 40 billion tokens, estimated at 25 % MFU while computing (23 % overall).
# Cost: 184 GPU hours, about $460.
# Watch: load_balancing_loss, which is 1 where all experts get the same; validation loss against the baseline's at
# the same tokens; coefficients of routed and shared experts (moa/... in TensorBoard).

# shellcheck source=examples/families/qwen_moe.sh
source "${BASH_SOURCE[0]%/*}/../families/qwen_moe.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --ffn-hidden-size 4096
    --moe-ffn-hidden-size 704
    --moe-shared-expert-intermediate-size 2816
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-40000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
LR=${LR:-4e-4}
