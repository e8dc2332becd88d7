# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 28
    --hidden-size 2048
    --num-attention-heads 32
    --ffn-hidden-size 8192
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-40000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
LR=${LR:-3e-4}
