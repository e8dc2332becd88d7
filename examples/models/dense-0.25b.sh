# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-1024}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 8
    --hidden-size 1024
    --num-attention-heads 16
    --ffn-hidden-size 4096
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-5000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 0.5 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
LR=${LR:-8e-4}
