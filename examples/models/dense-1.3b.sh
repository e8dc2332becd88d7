# shellcheck shell=bash disable=SC2034
# Dense 1.3B: h 2048, 32 heads of 64, 16 layers, f 4h.
# Width and depth are this project's choice, in the proportions of the smaller models.
#
#     python tools/plan.py dense-1.3b moa --gpus 64 --gpu h100 --mfu 0.4 --brief
#
# Parameters: 1,279,854,592; the mixture adds 458,752, 0.04 %; vocabulary 50,304.
# Hardware: 64 x H100 SXM 80 GB; TP 1, PP 1, DP 64, micro-batch 4; 24.8 GiB a GPU.
# Duration: 2.13 hours for 26 billion tokens, estimated at 40 % MFU while computing (40 % overall).
# Cost: 136 GPU hours, about $341.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 16
    --hidden-size 2048
    --num-attention-heads 32
    --ffn-hidden-size 8192
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-26000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
LR=${LR:-4e-4}
