# shellcheck shell=bash disable=SC2034
# Dense 0.9B: h 1600, 25 heads of 64, 18 layers, f 4h.
# Width and depth as in the code of the paper's group (arXiv 2502.19002); batch, tokens and rate are this project's.
#
#     python tools/plan.py dense-0.9b moa --gpus 8 --gpu h100 --mfu 0.4 --brief
#
# Parameters: 898,312,000; the mixture adds 403,200, 0.04 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 8; 34.0 GiB a GPU.
# Duration: 8.33 hours for 18 billion tokens, estimated at 40 % MFU while computing (40 % overall).
# Cost: 66.6 GPU hours, about $167.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 18
    --hidden-size 1600
    --num-attention-heads 25
    --ffn-hidden-size 6400
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-18000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-5e-4}
