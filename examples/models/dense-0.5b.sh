# shellcheck shell=bash disable=SC2034
# Dense 0.5B: h 1280, 20 heads of 64, 15 layers, f 4h.
# Width and depth as in the code of the paper's group (arXiv 2502.19002); batch, tokens and rate are this project's.
#
#     python tools/plan.py dense-0.5b moa --gpus 8 --gpu h100 --mfu 0.4 --brief
#
# Parameters: 522,033,920; the mixture adds 268,800, 0.05 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 8; 25.1 GiB a GPU.
# Duration: 2.62 hours for 10 billion tokens, estimated at 40 % MFU while computing (40 % overall).
# Cost: 21 GPU hours, about $52.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 15
    --hidden-size 1280
    --num-attention-heads 20
    --ffn-hidden-size 5120
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-10000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256} # samples: 0.5 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-6e-4}
