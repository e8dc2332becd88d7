#!/usr/bin/env bash
# Everything that only a GPU can show, with one command: accuracy, speed, memory, a real training.
#
#   tools/gpu_suite.sh [RESULTS]              results folder, default runs/gpu_suite; made anew
#   PYTHON=/path/to/python3 tools/gpu_suite.sh
#   SUITE_DEVICE=cpu SUITE_SCALE=tiny tools/gpu_suite.sh     the same flow in about 2 minutes without a GPU
#
# Hardware: one GPU of 80 GB (H100 or H200). Duration: under 9 minutes (SUITE_SECONDS, 520): what no time is left for is
# recorded as failed. Needs torch, triton and megatron-core; no network, no pytest, nothing installed.
# Results: results.jsonl (every figure with its environment), results.md (the same as tables), logs/ (one a step).
# Every step has a time limit; one that fails is recorded and the others go on. Exit code 1 if any failed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=${1:-runs/gpu_suite}
PYTHON=${PYTHON:-python3}
SUITE_DEVICE=${SUITE_DEVICE:-cuda}
SUITE_SCALE=${SUITE_SCALE:-full}
SUITE_SECONDS=${SUITE_SECONDS:-520}
case $SUITE_DEVICE in cuda | cpu) ;; *) echo "gpu_suite.sh: error: SUITE_DEVICE=$SUITE_DEVICE: say cuda or cpu" >&2; exit 2 ;; esac
case $SUITE_SCALE in full | tiny) ;; *) echo "gpu_suite.sh: error: SUITE_SCALE=$SUITE_SCALE: say full or tiny" >&2; exit 2 ;; esac
[ "$SUITE_DEVICE" = cpu ] && export CUDA_VISIBLE_DEVICES=
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONUNBUFFERED=1

if [ -e "$OUT" ] && [ ! -e "$OUT/results.jsonl" ] && [ -n "$(ls -A "$OUT")" ]; then
    echo "gpu_suite.sh: error: $OUT: holds something else; name another folder" >&2
    exit 2
fi
rm -rf "$OUT"
mkdir -p "$OUT/logs"
JSON=$OUT/results.jsonl
: >"$JSON"
failed=0

# record NAME EXIT_CODE SECONDS LIMIT
record() {
    local status=ok
    [ "$2" -eq 124 ] && status="out of time"
    [ "$2" -ne 0 ] && [ "$2" -ne 124 ] && status=failed
    [ "$2" -ne 0 ] && failed=1
    printf '{"benchmark": "suite", "step": "%s", "status": "%s", "exit_code": %d, "seconds": %d, "limit": %d}\n' \
        "$1" "$status" "$2" "$3" "$4" >>"$JSON"
    printf '%4d s  %-28s %s\n' "$SECONDS" "$1" "$status"
}

# run NAME LIMIT COMMAND...  with what is left of the whole suite's time, if that is less.
run() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    local left=$((SUITE_SECONDS - SECONDS))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        record "$name" 124 0 0
        return 1
    fi
    timeout -k 5 "$limit" "$@" >"$OUT/logs/$name.log" 2>&1
    code=$?
    record "$name" "$code" $((SECONDS - start)) "$limit"
    return "$code"
}

kernels() { run "$1" "$2" "$PYTHON" tools/benchmark_kernels.py --device "$SUITE_DEVICE" --json "$JSON" "${@:3}"; }
layer() { run "$1" "$2" "$PYTHON" tools/benchmark_layer.py --device "$SUITE_DEVICE" --json "$JSON" "${@:3}"; }

# step RECIPE LIMIT ARGUMENTS...
step() {
    run "step-$1" "$2" "$PYTHON" tools/benchmark_step.py "examples/models/$1.sh" --json "$JSON" "${@:3}" "${SHRINK[@]}"
}

# train MIXING ARM LIMIT FLAGS...
train() {
    # shellcheck source=/dev/null
    source examples/models/dense-134m.sh
    run "training-$1" "$3" "$PYTHON" pretrain_gpt_moa.py "${MODEL_ARGS[@]}" "${TRAINING[@]}" --moa-mixing "$1" "${@:4}" \
        --data-path "$OUT/corpus" --data-cache-path "$OUT/cache" --tokenizer-type NullTokenizer --vocab-size 257 \
        --split 95,5,0 --seed 1 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 \
        --num-workers 1 &&
        run "training-$1-figures" 60 "$PYTHON" tools/gpu_report.py training "$OUT/logs/training-$1.log" --arm "$2" \
            --json "$JSON"
}

# check LIMIT ARGUMENTS...  for all dtypes and backends at once: only times must not share the GPU.
check() {
    local start=$SECONDS name code dtype backend names=() pids=()
    for dtype in "${DTYPES[@]}"; do
        for backend in "${BACKENDS[@]}"; do
            name=accuracy-$dtype-$backend
            timeout -k 5 "$1" "$PYTHON" tools/benchmark_kernels.py --check --device "$SUITE_DEVICE" --dtype "$dtype" \
                --backend "$backend" --json "$OUT/$name.jsonl" "${@:2}" >"$OUT/logs/$name.log" 2>&1 &
            pids+=($!)
            names+=("$name")
        done
    done
    for index in "${!names[@]}"; do
        wait "${pids[$index]}"
        code=$?
        name=${names[$index]}
        record "$name" "$code" $((SECONDS - start)) "$1"
        [ -e "$OUT/$name.jsonl" ] && cat "$OUT/$name.jsonl" >>"$JSON" && rm "$OUT/$name.jsonl"
    done
}

# In the order of what matters most, should time run out.
if [ "$SUITE_SCALE" = full ]; then
    DTYPES=(fp32 bf16 fp16)
    BACKENDS=(triton compile eager)
    SHRINK=()
    TRAINING=(--bf16 --micro-batch-size 16 --global-batch-size 16 --train-iters 300 --lr-warmup-iters 30
        --log-interval 10 --eval-interval 300 --eval-iters 10)
    check 150
    kernels kernels-2b 100 --tokens 8192 --ffn 8192
    layer layer-dense-2b 50 --hidden 2048 --ffn 8192 --tokens 8192 --recompute
    layer layer-moe-2b 60 --hidden 1024 --ffn 704 --tokens 8192 --experts 32 --topk 4 --form bi-sided --mixing moa
    step dense-2b 50 --layers 8 --micro-batch-size 4
    step moe-2b 50 --layers 6 --micro-batch-size 4 --arms moa -- --moe-grouped-gemm
    run corpus 40 "$PYTHON" tools/gpu_report.py corpus "$OUT/corpus"
    train moa MoA 60
    train none SwiGLU 60
    step dense-0.5b 50 --micro-batch-size 8 --arms moa
    step dense-134m 50 --micro-batch-size 16 --arms moa
    step moe-0.5b 50 --micro-batch-size 4 --arms moa -- --moe-grouped-gemm
    kernels kernels-smaller 50 --grow ffn --values 3072 5120 --tokens 8192 --backend triton
    kernels kernels-by-k 50 --grow activations --values 1 2 4 7 12 --tokens 8192 --ffn 8192 --backend triton \
        --form bi-sided --mixing moa
    layer layer-dense-0.5b 40 --hidden 1280 --ffn 5120 --tokens 16384 --form bi-sided type1 --mixing moa
    layer layer-dense-134m 40 --hidden 768 --ffn 3072 --tokens 16384 --form bi-sided type1 --mixing moa
    layer layer-moe-0.5b 50 --hidden 512 --ffn 352 --tokens 8192 --experts 32 --topk 4 --form bi-sided --mixing moa
else
    DTYPES=(fp32)
    BACKENDS=(eager)
    SHRINK=(-- --num-layers 1 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 64
        --max-position-embeddings 64 --moa-backend eager)
    TRAINING=(--num-layers 1 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 64
        --max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 4 --train-iters 8 --lr-warmup-iters 1
        --log-interval 2 --eval-interval 8 --eval-iters 1)
    check 60 --form type1 bi-sided
    kernels kernels 60 --grow ffn --values 32 48 --tokens 64 --backend eager --rounds 2 --form type1 bi-sided
    layer layer-dense 60 --hidden 32 --ffn 48 --tokens 64 --backend eager --rounds 2 --form type1 bi-sided
    layer layer-moe 60 --hidden 32 --ffn 48 --tokens 64 --experts 4 --backend eager --rounds 2 --form bi-sided
    step dense-134m 60 --micro-batch-size 2 --rounds 2
    run corpus 60 "$PYTHON" tools/gpu_report.py corpus "$OUT/corpus" --glob 'asyncio/*.py'
    train moa MoA 60 --moa-backend eager
    train none SwiGLU 60
fi

"$PYTHON" tools/gpu_report.py table "$JSON" >"$OUT/results.md" 2>"$OUT/logs/report.log" || failed=1
echo "results: $OUT/results.md, $JSON; logs: $OUT/logs"
exit "$failed"
