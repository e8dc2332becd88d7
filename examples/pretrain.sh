#!/usr/bin/env bash
# Trains a model of examples/models/ with a mixture of activations, or without: one process, one node, or one node of many.
#
#   DATA_PATH=data/corpus TOKENIZER_MODEL=tokenizer.model examples/pretrain.sh dense-0.12b moa
#   examples/pretrain.sh dense-0.12b none --mock-data --train-iters 20        # random tokens: does it run, how fast
#   FFN=type1 OPTIMIZER=muon SCHEDULE=wsd LR=1e-3 examples/pretrain.sh dense-0.5b la --dry-run
#
# MODEL   a file of examples/models/ without its .sh, or the path of one of yours
# MIXING  none (Megatron's stock layers, the baseline), la, moa, in the form that --moa-form auto takes; or moa in one form: type1,
#         one-sided, bi-sided, quadratic; or la in one form: la-type1, la-one-sided, la-bi-sided, la-quadratic
# flags   of pretrain_gpt_moa.py: they come last, so they win. Those that a variable stands for set it, so that what is
#         reckoned from it follows: --lr LR, --seq-length SEQ_LENGTH, --global-batch-size GLOBAL_BATCH_SIZE,
#         --optimizer OPTIMIZER, --lr-decay-style SCHEDULE, --tensor-model-parallel-size TP, and --train-iters N the
#         TOKENS of N iterations. With flags of data, --mock-data too, variables of data are left out.
#         --dry-run prints the command and runs nothing.
#
# Variables, all optional but the data's:
#   DATA_PATH  a prefix, or weights and prefixes; or DATA_ARGS_PATH, a blend file;
#     or, without SPLIT, TRAIN_DATA_PATH, VALID_DATA_PATH (and TEST_DATA_PATH)
#   TOKENIZER_MODEL, TOKENIZER_TYPE (SentencePieceTokenizer), SPLIT (99,1,0), DATA_CACHE_PATH; VOCAB_SIZE for --mock-data
#   FFN (type2: gated layers; type1: Type I of width 4h, whose baseline is ReLU²)  FFN_MULTIPLE (1; 128 rounds widths up to its multiples)
#   OPTIMIZER (adamw, muon)  SCHEDULE (cosine, wsd)  LR  (as the model's file says: dense models adamw and cosine, MoE models muon and wsd)
#   MIN_LR (cosine: LR/20, wsd: 0)  DECAY_PERCENT (20, of wsd)  SEED (1)  PRECISION (bf16, fp32)
#   TOKENS_PER_PARAMETER (20; MoE models: 100 for each that a token meets)  TOKENS (that many)  WARMUP_TOKENS (TOKENS/50, ours)
#   SEQ_LENGTH  GLOBAL_BATCH_SIZE  MICRO_BATCH_SIZE (as the model's file says)
#   TP PP CP EP (1)  DISTRIBUTED_OPTIMIZER (1; 0 for Muon in fp32): tools/plan.py says which splits fit and are fast
#   RUN_DIR (runs/MODEL-MIXING, with FFN=type1 runs/MODEL-type1-MIXING, with --mock-data …-mock)  SAVE_INTERVAL EVAL_INTERVAL (500)  KEEP_LAST (2)
#   EVAL_ITERS (20 batches an evaluation)  LOG_INTERVAL (10 iterations)
#   NPROC_PER_NODE (the GPUs here, or 1)  NNODES (1)  NODE_RANK (0)  MASTER_ADDR  MASTER_PORT  LAUNCH_ARGS  PYTHON (python)
set -euo pipefail

unset CDPATH # with it cd goes elsewhere, and prints where
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/common.sh
source "$ROOT/examples/common.sh"
EXAMPLES=$ROOT/examples # model files find their family by it, wherever they lie

# names FOLDER: what can be chosen there, on one line
names() { (cd "$EXAMPLES/$1" && printf '%s\n' *.sh | sed 's/\.sh$//' | paste -sd ' '); }

case ${1:-} in -h | --help)
    show_help
    exit 0
    ;;
esac
[ $# -ge 2 ] || fail "needs MODEL and MIXING, such as: examples/pretrain.sh dense-0.12b moa; --help says more"
MODEL=$1 MIXING=$2
shift 2

# The trailing flags, without those that are for this script; what they say about data matters here.
FLAGS=() DRY_RUN='' DATA_GIVEN='' TOKENIZER_GIVEN=''
for flag in "$@"; do
    case ${flag%%=*} in
    --dry-run) DRY_RUN=1 && continue ;;
    --mock-data) DATA_GIVEN=mock ;;
    --data-path | --data-args-path) DATA_GIVEN=whole ;;
    --train-data-path | --per-split-data-args-path) DATA_GIVEN=parts ;;
    --tokenizer-* | --use-checkpoint-args) TOKENIZER_GIVEN=flags ;;
    esac
    FLAGS+=("$flag")
done

# take_flag FLAG VARIABLE: a variable takes the value of a trailing flag, so that what is reckoned from it follows
take_flag() {
    local index value
    for index in "${!FLAGS[@]}"; do
        case ${FLAGS[index]} in
        "$1"=*) value=${FLAGS[index]#*=} ;;
        "$1") value=${FLAGS[index + 1]:-} ;;
        *) continue ;;
        esac
        [ -n "$value" ] || fail "$1: has no value; give one, or leave the flag out"
        printf -v "$2" %s "$value"
        GIVEN_BY[$2]=$1
    done
}

# take_choice FLAG VARIABLE FOLDER: the same for a choice of FOLDER's files; what none of them sets is the flag's alone
take_choice() {
    local chosen='' file
    take_flag "$1" chosen
    file=$(grep -lxF -- "    $1 $chosen" "$EXAMPLES/$3"/*.sh) || return 0
    case $file in */"${!2:-}".sh*) return 0 ;; esac
    printf -v "$2" %s "$(basename "${file%%$'\n'*}" .sh)"
}

take_flags() {
    take_flag --lr LR
    take_flag --seq-length SEQ_LENGTH
    take_flag --global-batch-size GLOBAL_BATCH_SIZE
    take_flag --train-iters TRAIN_ITERS
    take_flag --tensor-model-parallel-size TP
    take_choice --optimizer OPTIMIZER optimizers
    take_choice --lr-decay-style SCHEDULE schedules
}

# The model: MODEL_ARGS, BASELINE_ARGS, PARAMETERS, and the defaults of its training.
case $MODEL in
*/*) MODEL_FILE=$MODEL ;;
*.sh) MODEL_FILE=./$MODEL ;; # bash would look for a bare name in PATH first
*) MODEL_FILE=$EXAMPLES/models/$MODEL.sh ;;
esac
[ -f "$MODEL_FILE" ] || fail "MODEL $MODEL: there is no such recipe; take one of: $(names models)"
RUN_DIR=${RUN_DIR:-runs/$(run_name "$MODEL" "$MIXING" "${FLAGS[@]}")} # before the model's file, which may set FFN
MODEL_ARGS=() BASELINE_ARGS=() PARAMETERS='' TRAIN_ITERS=''
take_flags
# Bash ends at a mistake in that file, and says so with 1.
trap '[ $? != 0 ] || fail "MODEL $MODEL: $MODEL_FILE ends the script; it may only set variables"; exit 2' EXIT
# shellcheck source=examples/models/dense-0.12b.sh
source "$MODEL_FILE"
trap - EXIT
take_flags # win over what the file says, too
((${#MODEL_ARGS[@]} > 0)) ||
    fail "MODEL_ARGS is not set: $MODEL_FILE has no flags of a model; set it, or source a file of examples/families"

# The mixture. All that a baseline and its mixture differ in.
case $MIXING in
none) MIXING_ARGS=(--moa-mixing none "${BASELINE_ARGS[@]}") ;;
la | moa) MIXING_ARGS=(--moa-mixing "$MIXING") ;;
type1 | one-sided | bi-sided | quadratic) MIXING_ARGS=(--moa-mixing moa --moa-form "$MIXING") ;;
la-type1 | la-one-sided | la-bi-sided | la-quadratic) MIXING_ARGS=(--moa-mixing la --moa-form "${MIXING#la-}") ;;
*) fail "MIXING $MIXING: unknown; take none, la, moa, type1, one-sided, bi-sided, quadratic, or one of these forms as la-FORM" ;;
esac
[ "$MIXING" = none ] || MIXING_ARGS+=(--moa-log-interval 100)

is_whole 9 SEQ_LENGTH GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE
TOKENS_PER_ITERATION=$((GLOBAL_BATCH_SIZE * SEQ_LENGTH))
MOST_TOKENS=$((10 ** 15 - 1)) # of products that are compared with it before they are taken
if [ -n "$TRAIN_ITERS" ]; then
    is_whole 15 TRAIN_ITERS
    ((TRAIN_ITERS <= MOST_TOKENS / TOKENS_PER_ITERATION)) ||
        fail "--train-iters $TRAIN_ITERS: of $TOKENS_PER_ITERATION tokens are not below 10^15 tokens; take fewer"
    TOKENS=$((TRAIN_ITERS * TOKENS_PER_ITERATION))
elif [ -z "${TOKENS:-}" ]; then
    is_whole 15 TOKENS_PER_PARAMETER
    [[ $PARAMETERS =~ ^[1-9][0-9]{0,14}$ ]] ||
        fail "TOKENS is not set: $MODEL_FILE has no PARAMETERS to reckon it by; set TOKENS"
    ((TOKENS_PER_PARAMETER <= MOST_TOKENS / PARAMETERS)) ||
        fail "TOKENS_PER_PARAMETER $TOKENS_PER_PARAMETER: for $PARAMETERS parameters not below 10^15 tokens; take fewer"
    TOKENS=$((TOKENS_PER_PARAMETER * PARAMETERS))
fi
is_whole 15 TOKENS
WARMUP_TOKENS=${WARMUP_TOKENS:-$((TOKENS / 50))}
[ "$WARMUP_TOKENS" = 0 ] || is_whole 15 WARMUP_TOKENS
is_set LR
[[ $LR =~ ^[0-9.]+([eE]-?[0-9]+)?$ ]] || fail "${GIVEN_BY[LR]:-LR} $LR: not a number; write it as 1e-3"
SEED=${SEED:-1}
[ "$SEED" = 0 ] || is_whole 15 SEED
TRAIN_ITERS=$(((TOKENS + TOKENS_PER_ITERATION - 1) / TOKENS_PER_ITERATION))
WARMUP_ITERS=$((WARMUP_TOKENS / TOKENS_PER_ITERATION))
((WARMUP_ITERS < TRAIN_ITERS)) || fail "WARMUP_TOKENS $WARMUP_TOKENS: not less than TOKENS $TOKENS; set WARMUP_TOKENS=$((TOKENS / 50))"
OPTIMIZER=${OPTIMIZER:-adamw} SCHEDULE=${SCHEDULE:-cosine}
[ -f "$EXAMPLES/optimizers/$OPTIMIZER.sh" ] || fail "OPTIMIZER $OPTIMIZER: unknown; take one of: $(names optimizers)"
[ -f "$EXAMPLES/schedules/$SCHEDULE.sh" ] || fail "SCHEDULE $SCHEDULE: unknown; take one of: $(names schedules)"
# shellcheck source=examples/optimizers/adamw.sh
source "$EXAMPLES/optimizers/$OPTIMIZER.sh"
# shellcheck source=examples/schedules/cosine.sh
source "$EXAMPLES/schedules/$SCHEDULE.sh"

TRAINING_ARGS=(
    --micro-batch-size "$MICRO_BATCH_SIZE"
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "$TRAIN_ITERS"
    --lr "$LR"
    --min-lr "$MIN_LR"
    --seed "$SEED"
)
case ${PRECISION:-bf16} in
bf16) TRAINING_ARGS+=(--bf16) ;;
fp32) ;;
*) fail "PRECISION $PRECISION: unknown; take bf16 or fp32" ;;
esac

TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} EP=${EP:-1}
is_whole 9 TP PP CP EP
# How the model lies over GPUs: one on each unless TP, PP, CP, EP say otherwise; the optimizer's state is shared out.
PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
)
[ "$TP" = 1 ] || PARALLEL_ARGS+=(--sequence-parallel)
[ "$CP" = 1 ] || PARALLEL_ARGS+=(--context-parallel-size "$CP")
case " ${MODEL_ARGS[*]} ${FLAGS[*]} " in *" --num-experts"[\ =]*)
    PARALLEL_ARGS+=(--expert-model-parallel-size "$EP" --expert-tensor-parallel-size 1 --moe-grouped-gemm)
    ;;
*) [ "$EP" = 1 ] || fail "EP $EP: $MODEL has no experts; leave EP out" ;;
esac
is_switch DISTRIBUTED_OPTIMIZER
if [[ "${PRECISION:-bf16} ${OPTIMIZER_ARGS[*]} ${FLAGS[*]} " =~ ^fp32.*' --optimizer'[\ =](muon|soap|lion)' ' ]]; then
    # Megatron shares their state out in bf16 alone.
    [ "${DISTRIBUTED_OPTIMIZER:-0}" = 0 ] ||
        fail "DISTRIBUTED_OPTIMIZER 1: ${BASH_REMATCH[1]} has none in PRECISION=fp32; leave it out, or take bf16"
    DISTRIBUTED_OPTIMIZER=0
fi
if [ "${DISTRIBUTED_OPTIMIZER:-1}" = 1 ]; then
    PARALLEL_ARGS+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
    # So that a checkpoint loads under another split.
    PARALLEL_ARGS+=(--dist-ckpt-optim-fully-reshardable)
fi

# take_data: adds the data that variables name
take_data() {
    local name variable given=() paths
    for name in DATA_PATH TRAIN_DATA_PATH DATA_ARGS_PATH; do
        [ -z "${!name:-}" ] || given+=("$name")
    done
    ((${#given[@]} < 2)) || fail "${given[0]}, ${given[1]}: both are set, and one alone is read; leave one out"
    if [ "${given[*]}" = TRAIN_DATA_PATH ]; then
        [ -z "${SPLIT:-}" ] ||
            fail "SPLIT $SPLIT: nothing is split with TRAIN_DATA_PATH; leave SPLIT out, or set DATA_PATH in its place"
    elif [ -n "${VALID_DATA_PATH:-}${TEST_DATA_PATH:-}" ]; then
        fail "VALID_DATA_PATH, TEST_DATA_PATH: read with TRAIN_DATA_PATH alone; set that instead, or leave them out"
    elif [ ${#given[@]} = 0 ]; then
        [ -n "$DRY_RUN" ] ||
            fail "DATA_PATH is not set: set it to the prefix of what tools/preprocess_data.py wrote, or add --mock-data"
        DATA_ARGS+=(--data-path DATA_PATH) # a placeholder
    fi
    for name in DATA_ARGS_PATH DATA_PATH TRAIN_DATA_PATH VALID_DATA_PATH TEST_DATA_PATH; do
        read -ra paths <<<"${!name:-}"
        variable=${name,,}
        [ ${#paths[@]} = 0 ] || DATA_ARGS+=("--${variable//_/-}" "${paths[@]}")
    done
    [ "${given[*]}" = TRAIN_DATA_PATH ] || DATA_ARGS+=(--split "${SPLIT:-99,1,0}")
}

if [ "$DATA_GIVEN" = mock ]; then
    # GPT-2's vocabulary: what the models' names count.
    DATA_ARGS=(--tokenizer-type NullTokenizer --vocab-size "${VOCAB_SIZE:-50257}")
else
    DATA_ARGS=(--tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}")
    case ${TOKENIZER_TYPE:-SentencePieceTokenizer}$TOKENIZER_GIVEN in
    SentencePieceTokenizer | HuggingFaceTokenizer) TOKENIZER_MODEL=${TOKENIZER_MODEL:-TOKENIZER_MODEL} ;; # a placeholder
    esac
    DATA_ARGS+=(${TOKENIZER_MODEL:+--tokenizer-model "$TOKENIZER_MODEL"})
    case $DATA_GIVEN in
    whole) DATA_ARGS+=(--split "${SPLIT:-99,1,0}") ;;
    parts) ;;
    *) take_data ;;
    esac
    [ "${TOKENIZER_MODEL:-}" != TOKENIZER_MODEL ] || [ -n "$DRY_RUN" ] ||
        fail "TOKENIZER_MODEL is not set: set it to the file of tools/train_tokenizer.py, or with TOKENIZER_TYPE=HuggingFaceTokenizer to a folder"
fi
DATA_ARGS+=(${DATA_CACHE_PATH:+--data-cache-path "$DATA_CACHE_PATH"})

# A run that is started again goes on where it was saved; SIGTERM and SIGUSR2 save first (docs/reliability.md).
RUN_ARGS=(
    --save "$RUN_DIR/checkpoints"
    --load "$RUN_DIR/checkpoints"
    --save-interval "${SAVE_INTERVAL:-500}"
    --moa-keep-last "${KEEP_LAST:-2}"
    --exit-signal-handler
    --eval-interval "${EVAL_INTERVAL:-500}"
    --eval-iters "${EVAL_ITERS:-20}"
    --log-interval "${LOG_INTERVAL:-10}"
    --log-throughput
    --tensorboard-dir "$RUN_DIR/tensorboard"
)

if [ -z "${NPROC_PER_NODE:-}" ]; then
    NPROC_PER_NODE=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # which nvidia-smi takes no notice of; CUDA reads it up to a -1
        visible=$(sed -E 's/(^|,)-1(,.*)?$//' <<<"$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || true)
        ((visible >= NPROC_PER_NODE)) || NPROC_PER_NODE=$visible
    fi
    ((NPROC_PER_NODE > 0)) || NPROC_PER_NODE=1
fi
NNODES=${NNODES:-1}
is_whole 9 NPROC_PER_NODE NNODES
COMMAND=("${PYTHON:-python}")
if ((NPROC_PER_NODE * NNODES > 1)); then
    COMMAND+=(-m megatron_moa.launch --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES")
    if ((NNODES > 1)); then
        [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR is not set: with NNODES=$NNODES set it to the host name of the node with NODE_RANK=0"
        COMMAND+=(--node-rank "${NODE_RANK:-0}" --master-addr "$MASTER_ADDR")
    fi
    COMMAND+=(${MASTER_PORT:+--master-port "$MASTER_PORT"})
    read -ra words <<<"${LAUNCH_ARGS:-}"
    COMMAND+=("${words[@]}")
fi
COMMAND+=("$ROOT/pretrain_gpt_moa.py")
COMMAND+=("${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${SCHEDULE_ARGS[@]}" "${PARALLEL_ARGS[@]}")
COMMAND+=("${DATA_ARGS[@]}" "${RUN_ARGS[@]}" "${MIXING_ARGS[@]}" "${FLAGS[@]}")

if [ -n "$DRY_RUN" ]; then
    print_command "${COMMAND[@]}"
    exit 0
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} # for the launcher: this may be another folder, and nothing installed
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron's overlap of TP, and of DP, relies on its order
exec "${COMMAND[@]}"
