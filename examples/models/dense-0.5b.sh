# shellcheck shell=bash disable=SC2034
# Dense 0.5B, a model of the paper: h 1280, 20 heads of 64, 18 layers, f = int(8h/3) = 3413.
#
#     python tools/plan.py dense-0.5b moa --gpus 8 --gpu h100 --mfu 0.4 --brief
#
# Parameters: 482,696,960; the mixture adds 322,560, 0.07 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 16; 24.3 GiB a GPU.
# Duration: 2.25 hours for 9.65 billion tokens, estimated at 40 % MFU while computing (40 % overall).
# Cost: 18 GPU hours, about $45.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

LAYERS=18 HIDDEN_SIZE=1280
FFN_WIDTH=$((8 * HIDDEN_SIZE / 3))
# shellcheck source=examples/families/llama.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16} # ours
LR=${LR:-2e-3} # the paper's rate, of every arm
