# shellcheck shell=bash disable=SC2034
# What all MoE models share: LLaMA-like layers whose feed-forward part is 32 routed experts, 4 a token, and a shared expert behind a
# sigmoid gate, in the style of Qwen2-MoE: routed experts are narrow (f 0.6875 h), the shared one is four times as wide,
# probabilities are not rescaled after the choice. Number and width of experts are this project's choice.
# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/llama.sh"
FAMILY_ARGS+=(
    --num-experts 32
    --moe-router-topk 4
    --moe-router-pre-softmax
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-shared-expert-gate
    --moe-token-dispatcher-type alltoall
)
