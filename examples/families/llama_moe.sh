# shellcheck shell=bash disable=SC2034
# MoE models, the paper's LlamaMoE: as llama.sh, with 32 routed experts, 4 a token, and one shared expert as the feed-forward part.
# A model's file sets EXPERT_WIDTH too, that of a routed expert; FFN_WIDTH is the shared expert's. FFN=type1 gives routed experts
# of width h (ours). PARAMETERS are those that a token meets: about 100 tokens for each of these, Muon and WSD are the paper's.
#
# The paper does not say, so ours: each expert has gates of its own; softmax over all 32 before the choice, probabilities not rescaled after it;
# a balancing loss of 1e-3. A gate on the shared expert, as Qwen-MoE has it, is left out, too: the paper's printed sizes
# do not show it. Add --moe-shared-expert-gate for it.
OPTIMIZER=${OPTIMIZER:-muon} SCHEDULE=${SCHEDULE:-wsd} TOKENS_PER_PARAMETER=${TOKENS_PER_PARAMETER:-100}
# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/llama.sh"

[ "$FFN" = type2 ] || EXPERT_WIDTH=$HIDDEN_SIZE
is_whole 6 EXPERT_WIDTH
EXPERT_WIDTH=$(rounded "$EXPERT_WIDTH")
MODEL_ARGS+=(
    --num-experts 32
    --moe-router-topk 4
    --moe-ffn-hidden-size "$EXPERT_WIDTH"
    --moe-shared-expert-intermediate-size "$FFN_WIDTH"
    --moe-router-pre-softmax
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-token-dispatcher-type alltoall
)

# The router, the shared expert and 4 of the experts.
MOE_WIDTH=$((FFN_WIDTH + 4 * EXPERT_WIDTH))
PARAMETERS=$((OUTSIDE_LAYERS + LAYERS * (ATTENTION + 32 * HIDDEN_SIZE + FFN_MATRICES * HIDDEN_SIZE * MOE_WIDTH)))
