# shellcheck shell=bash disable=SC2034
# MoE 0.5B, a model of the paper: h 768, 12 heads of 64, 9 layers; 32 experts, 4 a token, of f = int(2h/3) = 512;
# a shared one of int(8h/3) = 2048.
#
#     python tools/plan.py moe-0.5b moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 480,942,336, 183,671,040 of them for a token; the mixture adds 1,596,672, 0.33 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 16; 18.9 GiB a GPU.
# Duration: 2.36 hours for 18.4 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 18.9 GPU hours, about $47.
# Watch: load_balancing_loss, which is 1 where all experts get the same; validation loss against the baseline's at
# the same tokens; coefficients of routed and shared experts (moa/... in TensorBoard).

LAYERS=9 HIDDEN_SIZE=768
FFN_WIDTH=$((8 * HIDDEN_SIZE / 3)) EXPERT_WIDTH=$((2 * HIDDEN_SIZE / 3))
# shellcheck source=examples/families/llama_moe.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/llama_moe.sh"

MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16} # ours
LR=${LR:-1e-3} # the paper's best rate of the baseline
