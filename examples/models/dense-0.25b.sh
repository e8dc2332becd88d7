# shellcheck shell=bash disable=SC2034
# Dense 0.25B, a model of the paper: h 1024, 16 heads of 64, 12 layers, f = int(8h/3) = 2730.
#
#     python tools/plan.py dense-0.25b moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 254,018,560; the mixture adds 172,032, 0.07 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 16; 17.1 GiB a GPU.
# Duration: 55.4 minutes for 5.08 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 7.38 GPU hours, about $18.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

LAYERS=12 HIDDEN_SIZE=1024
FFN_WIDTH=$((8 * HIDDEN_SIZE / 3))
# shellcheck source=examples/families/llama.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16} # ours
LR=${LR:-2e-3} # the paper's best rate of the baseline
