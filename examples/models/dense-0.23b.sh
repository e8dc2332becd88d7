# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/families/llama.sh
source "${BASH_SOURCE[0]%/*}/../families/llama.sh"

SEQ_LENGTH=${SEQ_LENGTH:-1024}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 16
    --hidden-size 768
    --num-attention-heads 12
    --ffn-hidden-size 3072
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-4600000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 0.5 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
LR=${LR:-1e-3}
