# shellcheck shell=bash disable=SC2034
# Dense 0.75B: h 1664, 26 heads of 64, 13 layers, f 4h.
# Width and depth as in the code of the paper's group (arXiv 2502.19002); batch, tokens and rate are this project's.
#
#     python tools/plan.py dense-0.75b moa --gpus 8 --gpu h100 --mfu 0.4 --brief
#
# Parameters: 743,387,008; the mixture adds 302,848, 0.04 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 8; 28.3 GiB a GPU.
# Duration: 5.57 hours for 15 billion tokens, estimated at 40 % MFU while computing (40 % overall).
# Cost: 44.6 GPU hours, about $111.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 13
    --hidden-size 1664
    --num-attention-heads 26
    --ffn-hidden-size 6656
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-15000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-6e-4}
