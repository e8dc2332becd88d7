# shellcheck shell=bash disable=SC2034
# MoE 2B, a model of the paper: h 1280, 20 heads of 64, 15 layers; 32 experts, 4 a token, of f = int(2h/3) = 853;
# a shared one of int(8h/3) = 3413.
#
#     python tools/plan.py moe-2b moa --gpus 64 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 1,996,574,720, 620,856,320 of them for a token; the mixture adds 4,435,200, 0.22 %; vocabulary 50,304.
# Hardware: 64 x H100 SXM 80 GB; TP 1, PP 1, EP 8, DP 64, micro-batch 8; 19.8 GiB a GPU.
# Duration: 4.72 hours for 62.1 billion tokens, estimated at 25 % MFU while computing (20 % overall).
# Cost: 302 GPU hours, about $755.
# Watch: load_balancing_loss, which is 1 where all experts get the same; validation loss against the baseline's at
# the same tokens; coefficients of routed and shared experts (moa/... in TensorBoard).

LAYERS=15 HIDDEN_SIZE=1280
FFN_WIDTH=$((8 * HIDDEN_SIZE / 3)) EXPERT_WIDTH=$((2 * HIDDEN_SIZE / 3))
# shellcheck source=examples/families/llama_moe.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama_moe.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8} # ours
LR=${LR:-6e-4} # the paper's best rate of the baseline
