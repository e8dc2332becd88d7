# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 18
    --hidden-size 1600
    --num-attention-heads 25
    --ffn-hidden-size 6400
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-18000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-5e-4}
