# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/families/qwen_moe.sh
source "${BASH_SOURCE[0]%/*}/../families/qwen_moe.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 20
    --hidden-size 768
    --num-attention-heads 12
    --ffn-hidden-size 3072
    --moe-ffn-hidden-size 528
    --moe-shared-expert-intermediate-size 2112
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-20000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 1 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-5e-4}
