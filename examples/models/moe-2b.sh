# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/families/qwen_moe.sh
source "${BASH_SOURCE[0]%/*}/../families/qwen_moe.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --ffn-hidden-size 4096
    --moe-ffn-hidden-size 704
    --moe-shared-expert-intermediate-size 2816
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-40000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
LR=${LR:-4e-4}
