# shellcheck shell=bash disable=SC2034
# GPT-2-like 124M, the size of GPT-2 small: h 768, 12 heads of 64, 12 layers, f 4h. Its mixture is Type I.
# Tokens, batch and rate are this project's choice.
#
#     python tools/plan.py gpt2-124m moa --gpus 8 --gpu h100 --mfu 0.25 --brief
#
# Parameters: 124,475,904; the mixture adds 46,080, 0.04 %; vocabulary 50,304.
# Hardware: 8 x H100 SXM 80 GB; TP 1, PP 1, DP 8, micro-batch 16; 14.5 GiB a GPU.
# Duration: 16.8 minutes for 2.49 billion tokens, estimated at 25 % MFU while computing (25 % overall).
# Cost: 2.24 GPU hours, about $6.
# Watch: the gradient norm; validation loss against the baseline's at the same tokens, each at its own best rate.
# The fixed activation is GELU in its exact form, GPT-2's own is the tanh approximation.

# shellcheck source=examples/families/gpt2.sh
source "${EXAMPLES:-${BASH_SOURCE[0]%/*}/..}/families/gpt2.sh"

SEQ_LENGTH=${SEQ_LENGTH:-1024}
MODEL_ARGS=(
    "${FAMILY_ARGS[@]}"
    --num-layers 12
    --hidden-size 768
    --num-attention-heads 12
    --ffn-hidden-size 3072
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
)

PARAMETERS=124475904 # as above, without a mixture
TOKENS_PER_PARAMETER=${TOKENS_PER_PARAMETER:-20}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} # samples: 0.5 million tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
LR=${LR:-6e-4}
