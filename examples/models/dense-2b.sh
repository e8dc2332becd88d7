# shellcheck shell=bash disable=SC2034
# Dense 2B, not of the paper but ours: h 2048, 32 heads of 64, 28 layers, f = 4h, which tensor parallelism divides.
# Sequence length and learning rate are ours too.
#
#     python tools/plan.py dense-2b moa --gpus 64 --gpu h100 --mfu 0.4 --brief
#
# Parameters: 2,085,210,112; the mixture adds 802,816, 0.04 %; vocabulary 50,304.
# Hardware: 64 x H100 SXM 80 GB; TP 1, PP 1, DP 64, micro-batch 4; 37.5 GiB a GPU.
# Duration: 5.77 hours for 41.7 billion tokens, estimated at 40 % MFU while computing (40 % overall).
# Cost: 369 GPU hours, about $924.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

LAYERS=28 HIDDEN_SIZE=2048
FFN_WIDTH=$((4 * HIDDEN_SIZE))
SEQ_LENGTH=${SEQ_LENGTH:-2048}
# shellcheck source=examples/families/llama.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
LR=${LR:-3e-4}
