# shellcheck shell=bash disable=SC2034
# Dense 0.25B: h 1024, 16 heads of 64, 8 layers, f 4h.
# Width and depth as in the code of the paper's group (arXiv 2502.19002); batch, tokens and rate are this project's.
#
#     python tools/plan.py dense-0.25b moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 237,257,728; the mixture adds 114,688, 0.05 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 16; 15.9 GiB a GPU.
# Duration: 49.2 minutes for 5 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 6.56 GPU hours, about $16.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-1024}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 8
    --hidden-size 1024
    --num-attention-heads 16
    --ffn-hidden-size 4096
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-5000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 0.5 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
LR=${LR:-8e-4}
