# shellcheck shell=bash disable=SC2034
# Dense 1.3B, not of the paper but ours: h 2048, 32 heads of 64, 16 layers, f = 4h, which tensor parallelism divides.
# Sequence length and learning rate are ours too.
#
#     python tools/plan.py dense-1.3b moa --gpus 64 --gpu h100 --mfu 0.4 --brief
#
# Parameters: 1,279,854,592; the mixture adds 458,752, 0.04 %; vocabulary 50,304.
# Hardware: 64 x H100 SXM 80 GB; TP 1, PP 1, DP 64, micro-batch 4; 24.8 GiB a GPU.
# Duration: 2.1 hours for 25.6 billion tokens, estimated at 40 % MFU while computing (40 % overall).
# Cost: 134 GPU hours, about $336.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

LAYERS=16 HIDDEN_SIZE=2048
FFN_WIDTH=$((4 * HIDDEN_SIZE))
SEQ_LENGTH=${SEQ_LENGTH:-2048}
# shellcheck source=examples/families/llama.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
LR=${LR:-4e-4}
