# shellcheck shell=bash disable=SC2034
# Dense 0.12B, a model of the paper: h 768, 12 heads of 64, 6 layers, f = int(8h/3) = 2048.
#
#     python tools/plan.py dense-0.12b moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 119,744,256; the mixture adds 64,512, 0.05 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 16; 12.1 GiB a GPU.
# Duration: 10.4 minutes for 2.39 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 1.39 GPU hours, about $3.
# Watch: the gradient norm, falling to below 1 after the warm-up; validation loss against the baseline's at the same
# tokens, each at its own best rate; coefficients by layer (moa/... in TensorBoard).

LAYERS=6 HIDDEN_SIZE=768
FFN_WIDTH=$((8 * HIDDEN_SIZE / 3))
# shellcheck source=examples/families/llama.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16} # ours
LR=${LR:-2e-3} # the paper's best rate of the baseline at 20 tokens a parameter; at 100 (TOKENS_PER_PARAMETER) it is 4e-3
