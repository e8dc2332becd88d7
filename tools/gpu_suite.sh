#!/usr/bin/env bash
# Everything that only a GPU can show, with one command: accuracy, speed, memory, a real training.
#
#   tools/gpu_suite.sh [RESULTS]              a new folder for the results, default runs/gpu_suite
#   PYTHON=/path/to/python3 tools/gpu_suite.sh
#   SUITE_DEVICE=cpu SUITE_SCALE=tiny tools/gpu_suite.sh     the same flow in about 2 minutes without a GPU
#   SUITE_STUDY=examples/studies/gpu-dense.toml tools/gpu_suite.sh    what time is left trains a study's runs
#
# Hardware: one GPU of 80 GB (H100 or H200), 16 CPU cores. Duration: under 10 minutes (SUITE_SECONDS, 570): what no time
# is left for is recorded as out of time. Needs torch, triton and megatron-core; no network, nothing installed; with
# pytest and pytest-xdist tests/test_gpu.py runs, too; layers that recompute need ninja and a C++ compiler.
# Order: tests that never ran on a GPU, kernels, steps of four recipes, tanh.approx of all inputs; then the rest.
# A study (SUITE_STUDY) keeps its folder, runs/study-NAME: the next call, with another RESULTS, goes on from its runs'
# last checkpoints.
# Results: results.jsonl (every figure with its environment), results.md (the same as tables), logs/ (one a step).
# Every step has a time limit; one that fails is recorded and the others go on. Exit code 1 if any failed.
set -u
[ $# -eq 0 ] || [ -z "$1" ] || set -- "$(realpath -ms -- "$1")" # a path from where the command is given
SUITE_STUDY=${SUITE_STUDY:+$(realpath -ms -- "$SUITE_STUDY")}
unset CDPATH # with it cd goes elsewhere, and prints where
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=${1:-runs/gpu_suite}
PYTHON=${PYTHON:-python3}
SUITE_DEVICE=${SUITE_DEVICE:-cuda}
SUITE_SCALE=${SUITE_SCALE:-full}
SUITE_SECONDS=${SUITE_SECONDS:-570}
fail() {
    echo "gpu_suite.sh: error: $1" >&2
    exit 2
}
case $SUITE_DEVICE in cuda | cpu) ;; *) fail "SUITE_DEVICE=$SUITE_DEVICE: say cuda or cpu" ;; esac
case $SUITE_SCALE in full | tiny) ;; *) fail "SUITE_SCALE=$SUITE_SCALE: say full or tiny" ;; esac
[[ $SUITE_SECONDS =~ ^[1-9][0-9]{0,8}$ ]] || fail "SUITE_SECONDS=$SUITE_SECONDS: not a whole number; give one such as 570"
command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program; name a python3"
[ -z "$SUITE_STUDY" ] || [ -f "$SUITE_STUDY" ] || fail "SUITE_STUDY=$SUITE_STUDY: no such file; see examples/studies"
[ "$SUITE_DEVICE" = cpu ] && export CUDA_VISIBLE_DEVICES=
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONUNBUFFERED=1

if [ -e "$OUT" ] && [ -n "$(ls -A "$OUT")" ]; then
    fail "$OUT: is there already; name another folder, or move it away"
fi
mkdir -p "$OUT/logs" || exit 2
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

# step NAME LIMIT RECIPE ARGUMENTS...
step() { run "step-$1" "$2" "$PYTHON" tools/benchmark_step.py --json "$JSON" "${@:3}" "${SHRINK[@]}"; }

# tests NAME LIMIT WHICH WORKERS  those of tests/test_gpu.py that pytest's expression names; none without a GPU.
tests() {
    [ "$SUITE_DEVICE" = cuda ] && "$PYTHON" -c 'import pytest, xdist' 2>/dev/null || return 0
    run "$1" "$2" "$PYTHON" -m pytest -v -s -n "$4" -p no:cacheprovider tests/test_gpu.py -k "$3"
}

# train MIXING ARM LIMIT FLAGS...
train() {
    # shellcheck source=/dev/null
    source examples/models/dense-0.12b.sh
    run "training-$1" "$3" "$PYTHON" pretrain_gpt_moa.py "${MODEL_ARGS[@]}" "${TRAINING[@]}" --moa-mixing "$1" "${@:4}" \
        --data-path "$OUT/corpus" --data-cache-path "$OUT/cache" --tokenizer-type NullTokenizer --vocab-size 257 \
        --split 95,5,0 --seed 1 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 \
        --num-workers 1 &&
        run "training-$1-figures" 60 "$PYTHON" tools/gpu_report.py training "$OUT/logs/training-$1.log" --arm "$2" \
            --json "$JSON"
}

# check LIMIT DTYPE-BACKEND...  all forms of these at once: only times must not share the GPU.
check() {
    local start=$SECONDS limit=$1 name code checked form names=() pids=()
    shift
    for checked in "$@"; do
        for form in "${FORMS[@]}"; do
            name=accuracy-$checked-$form
            timeout -k 5 "$limit" "$PYTHON" tools/benchmark_kernels.py --check --device "$SUITE_DEVICE" \
                --dtype "${checked%-*}" --backend "${checked#*-}" --form "$form" --json "$OUT/$name.jsonl" \
                >"$OUT/logs/$name.log" 2>&1 &
            pids+=($!)
            names+=("$name")
        done
    done
    for index in "${!names[@]}"; do
        wait "${pids[$index]}"
        code=$?
        name=${names[$index]}
        record "$name" "$code" $((SECONDS - start)) "$limit"
        [ -e "$OUT/$name.jsonl" ] && cat "$OUT/$name.jsonl" >>"$JSON" && rm "$OUT/$name.jsonl"
    done
}

# study FLAGS...  trains SUITE_STUDY's runs until the suite's time is over, which is no fault: they go on the next time.
study() {
    local left=$((SUITE_SECONDS - SECONDS)) start=$SECONDS code
    [ -n "$SUITE_STUDY" ] && [ "$left" -ge 60 ] || return 0
    timeout -k 5 "$left" "$PYTHON" tools/study.py --study "$SUITE_STUDY" "$@" >"$OUT/logs/study.log" 2>&1
    code=$?
    [ "$code" -eq 124 ] && code=0
    record study "$code" $((SECONDS - start)) "$left"
}

# In the order of what matters most, should time run out; the comments are seconds that a step took on an H200, where
# one of the same shape has run there.
if [ "$SUITE_SCALE" = full ]; then
    FORMS=(type1 one-sided bi-sided quadratic)
    SHRINK=()
    TRAINING=(--bf16 --micro-batch-size 16 --global-batch-size 16 --train-iters 300 --lr-warmup-iters 30
        --log-interval 10 --eval-interval 300 --eval-iters 10)
    ACCURACY=test_mixture_is_accurate TANH=test_tanh_has_eleven_bits_everywhere
    tests tests-first 150 "not $ACCURACY and not $TANH" 14
    # Each of these first compares its own results with float64, so no wrong kernel is timed.
    kernels kernels-2b 90 --tokens 8192 --ffn 8192 --form type1 bi-sided                                          # 62
    kernels kernels-others 60 --tokens 8192 --ffn 8192 --backend triton --form one-sided quadratic
    step dense-0.12b 60 dense-0.12b --micro-batch-size 16 --arms moa compiled
    step dense-0.5b 60 dense-0.5b --micro-batch-size 8 --arms moa compiled
    step dense-0.5b-type1 60 dense-0.5b --type1 --micro-batch-size 8 --arms moa compiled
    step dense-2b 60 dense-2b --layers 8 --micro-batch-size 4 --arms moa compiled                 # 33 with la, moa
    step moe-2b 60 moe-2b --layers 6 --micro-batch-size 8 --arms moa -- --moe-grouped-gemm
    tests tests-tanh 60 "$TANH" 0
    # 135 for twelve processes of Triton's beside 16 other busy ones on 16 cores. The compiler takes several times as
    # long: the tests check it in the other dtypes. The reference is what all are held to.
    check 220 fp32-triton bf16-triton fp16-triton bf16-compile
    layer layer-dense-2b 60 --hidden 2048 --ffn 8192 --tokens 8192 --form type1 bi-sided --recompute              # 40
    run corpus 40 "$PYTHON" tools/gpu_report.py corpus "$OUT/corpus"                                              # 12
    train moa MoA 70
    train none SwiGLU 70
    layer layer-moe-2b 60 --hidden 1280 --ffn 853 --tokens 8192 --experts 32 --topk 4 --form one-sided --mixing moa
    kernels kernels-by-k 50 --grow activations --values 1 2 4 7 12 --tokens 8192 --ffn 8192 --backend triton \
        --form bi-sided --mixing moa
    step moe-0.5b 50 moe-0.5b --micro-batch-size 8 --arms moa -- --moe-grouped-gemm
    kernels kernels-smaller 50 --grow ffn --values 2048 3413 --tokens 8192 --backend triton
    layer layer-dense-0.5b 40 --hidden 1280 --ffn 3413 --tokens 16384 --form bi-sided quadratic --mixing moa
    layer layer-dense-0.12b 40 --hidden 768 --ffn 2048 --tokens 16384 --form bi-sided quadratic --mixing moa
    layer layer-moe-0.5b 50 --hidden 768 --ffn 512 --tokens 8192 --experts 32 --topk 4 --form one-sided --mixing moa
    tests tests-accuracy 220 "$ACCURACY" 14
    study
else
    FORMS=(type1 bi-sided)
    SHRINK=(-- --num-layers 1 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 64
        --max-position-embeddings 64 --moa-backend eager)
    TRAINING=(--num-layers 1 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 64
        --max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 4 --train-iters 8 --lr-warmup-iters 1
        --log-interval 2 --eval-interval 8 --eval-iters 1)
    check 120 fp32-eager
    kernels kernels 120 --grow ffn --values 32 48 --tokens 64 --backend eager --rounds 2 --form type1 bi-sided
    layer layer-dense 120 --hidden 32 --ffn 48 --tokens 64 --backend eager --rounds 2 --form type1 bi-sided
    layer layer-moe 120 --hidden 32 --ffn 48 --tokens 64 --experts 4 --backend eager --rounds 2 --form one-sided
    step dense-0.12b 120 dense-0.12b --micro-batch-size 2 --rounds 2
    run corpus 120 "$PYTHON" tools/gpu_report.py corpus "$OUT/corpus" --glob 'asyncio/*.py'
    train moa MoA 120 --moa-backend eager
    train none SwiGLU 120
    study --scale smoke
fi

"$PYTHON" tools/gpu_report.py table "$JSON" >"$OUT/results.md" 2>"$OUT/logs/report.log" || failed=1
echo "results: $OUT/results.md, $JSON; logs: $OUT/logs"
exit "$failed"
