# shellcheck shell=bash disable=SC2034
# What GPT-2-like models share: LayerNorm, learned positions, GELU (Type I) or a mixture in its place, biases, tied
# embeddings, no dropout.
# shellcheck source=examples/common.sh
source "${BASH_SOURCE[0]%/*}/../common.sh"
[ "${FFN:-type1}" = type1 ] || fail "FFN $FFN: GPT-2-like models have Type I layers; leave FFN out"
FAMILY_ARGS=(
    --normalization LayerNorm
    --position-embedding-type learned_absolute
    --hidden-dropout 0
    --attention-dropout 0
)
