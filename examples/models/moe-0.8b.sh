# shellcheck shell=bash disable=SC2034
# MoE 0.8B, a model of the paper: h 960, 15 heads of 64, 10 layers; 32 experts, 4 a token, of f = int(2h/3) = 640;
# a shared one of int(8h/3) = 2560.
#
#     python tools/plan.py moe-0.8b moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 797,327,040, 281,231,040 of them for a token; the mixture adds 2,217,600, 0.28 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 16; 23.5 GiB a GPU.
# Duration: 5.76 hours for 28.1 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 46.1 GPU hours, about $115.
# Watch: load_balancing_loss, which is 1 where all experts get the same; validation loss against the baseline's at
# the same tokens; coefficients of routed and shared experts (moa/... in TensorBoard).

LAYERS=10 HIDDEN_SIZE=960
FFN_WIDTH=$((8 * HIDDEN_SIZE / 3)) EXPERT_WIDTH=$((2 * HIDDEN_SIZE / 3))
# shellcheck source=examples/families/llama_moe.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama_moe.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16} # ours
LR=${LR:-1e-3} # the paper's best rate of the baseline
