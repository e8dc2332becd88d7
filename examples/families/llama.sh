# shellcheck shell=bash disable=SC2034
# Dense LLaMA-like models, the paper's (section 5): RMSNorm before each part, RoPE, SwiGLU (eq. 2) or a mixture in its place,
# multi-head attention with heads of 64, no biases, untied embeddings; no dropout.
#
# A model's file sets LAYERS, HIDDEN_SIZE (a multiple of 64) and FFN_WIDTH, and then sources this file, which gives
#   MODEL_ARGS     the model's flags
#   BASELINE_ARGS  further ones of MIXING none: its activation, where it is not SwiGLU
#   PARAMETERS     as the paper counts them: vocabulary 50,304, no mixture
# and the defaults of its training. AdamW, cosine, 20 tokens a parameter, 512 samples of 1,024 tokens are the paper's.
#
# FFN=type1 is the same model with Type I layers (eq. 1) of width 4h, and ReLU² as the baseline's activation.
# FFN_MULTIPLE=128 rounds widths up: int(8h/3) may be odd, which tensor cores and tensor parallelism do not take well.
# shellcheck source=examples/common.sh
source "${BASH_SOURCE[0]%/*}/../common.sh"

FFN=${FFN:-type2} FFN_MULTIPLE=${FFN_MULTIPLE:-1}
is_whole 6 FFN_MULTIPLE LAYERS HIDDEN_SIZE
((HIDDEN_SIZE % 64 == 0)) || fail "HIDDEN_SIZE $HIDDEN_SIZE: not a multiple of 64, the width of a head; take $(((HIDDEN_SIZE / 64 + 1) * 64))"

# rounded WIDTH: the next multiple of FFN_MULTIPLE
rounded() { echo $((($1 + FFN_MULTIPLE - 1) / FFN_MULTIPLE * FFN_MULTIPLE)); }

BASELINE_ARGS=()
case $FFN in
type2)
    is_whole 6 FFN_WIDTH
    FFN_WIDTH=$(rounded "$FFN_WIDTH")
    FFN_MATRICES=3 FFN_ARGS=(--swiglu)
    ;;
type1)
    FFN_WIDTH=$(rounded $((4 * HIDDEN_SIZE)))
    FFN_MATRICES=2 FFN_ARGS=()
    BASELINE_ARGS=(--squared-relu)
    ;;
*) fail "FFN $FFN: unknown; take type2 (gated layers) or type1" ;;
esac

SEQ_LENGTH=${SEQ_LENGTH:-1024}
MODEL_ARGS=(
    --num-layers "$LAYERS"
    --hidden-size "$HIDDEN_SIZE"
    --num-attention-heads "$((HIDDEN_SIZE / 64))"
    --ffn-hidden-size "$FFN_WIDTH"
    "${FFN_ARGS[@]}"
    --normalization RMSNorm
    --position-embedding-type rope
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --hidden-dropout 0
    --attention-dropout 0
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

# Embedding, output layer and final norm; of each layer attention, two norms and the feed-forward part.
OUTSIDE_LAYERS=$((2 * 50304 * HIDDEN_SIZE + HIDDEN_SIZE))
ATTENTION=$((4 * HIDDEN_SIZE * HIDDEN_SIZE + 2 * HIDDEN_SIZE))
PARAMETERS=$((OUTSIDE_LAYERS + LAYERS * (ATTENTION + FFN_MATRICES * HIDDEN_SIZE * FFN_WIDTH)))

TOKENS_PER_PARAMETER=${TOKENS_PER_PARAMETER:-20}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples
OPTIMIZER=${OPTIMIZER:-adamw} SCHEDULE=${SCHEDULE:-cosine}
