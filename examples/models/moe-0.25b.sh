# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/families/qwen_moe.sh
source "${BASH_SOURCE[0]%/*}/../families/qwen_moe.sh"

SEQ_LENGTH=${SEQ_LENGTH:-2048}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 18
    --hidden-size 384
    --num-attention-heads 6
    --ffn-hidden-size 1536
    --moe-ffn-hidden-size 264
    --moe-shared-expert-intermediate-size 1056
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

TOKENS=${TOKENS:-5000000000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256} # samples: 0.5 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LR=${LR:-8e-4}
