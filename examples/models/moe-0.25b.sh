# shellcheck shell=bash disable=SC2034
# MoE 0.25B, a model of the paper: h 640, 10 heads of 64, 6 layers; 32 experts, 4 a token, of f = int(2h/3) = 426;
# a shared one of int(8h/3) = 1706.
#
#     python tools/plan.py moe-0.25b moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 251,044,480, 113,633,920 of them for a token; the mixture adds 887,040, 0.35 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 16; 14.4 GiB a GPU.
# Duration: 49.1 minutes for 11.4 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 6.55 GPU hours, about $16.
# Watch: load_balancing_loss, which is 1 where all experts get the same; validation loss against the baseline's at
# the same tokens; coefficients of routed and shared experts (moa/... in TensorBoard).

LAYERS=6 HIDDEN_SIZE=640
FFN_WIDTH=$((8 * HIDDEN_SIZE / 3)) EXPERT_WIDTH=$((2 * HIDDEN_SIZE / 3))
# shellcheck source=examples/families/llama_moe.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama_moe.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16} # ours
LR=${LR:-2e-3} # the paper's best rate of the baseline
