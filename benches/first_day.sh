#!/usr/bin/env bash
# The first hour on a GPU: checks, then measurements, the most telling first.
#   benches/first_day.sh OUT            about 25 minutes; a step that is complete is not run again
#   benches/first_day.sh --pack FILE    an archive (.tar, .tar.gz) for a GPU machine without Rust:
#                                       unpack it there and run dfar-first-day/benches/first_day.sh OUT
# OUT gets environment.txt, one NAME.txt (and .json) for each step, and steps.tsv: name, exit
# status, seconds. A step that fails or takes too long is filed, and the next one runs. Exits with 1
# if a step failed. SKIPPED steps say why in steps.tsv. DFAR_BUILT=1: the programs are built already.
# DFAR_FIRST_DAY=small: tiny sizes, for the test driver.
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
small=$([ "${DFAR_FIRST_DAY:-full}" = small ] && echo 1 || echo 0)
profile=${DFAR_PROFILE:-$([ "$small" = 1 ] && echo dev || echo release)}
programs=${CARGO_TARGET_DIR:-$root/target}/$([ "$profile" = dev ] && echo debug || echo "$profile")
packed=$([ -d "$root/bin" ] && echo 1 || echo 0)
if [ "$packed" = 1 ]; then programs=$root/bin; fi

build=(cargo build --profile "$profile" -p dfar -p dfar-baselines --bins)

# The test program of tests/NAME.rs.
test_program() {
    if [ "$packed" = 1 ]; then
        echo "$programs/$1"
    else
        cargo test --quiet --profile "$profile" --no-run --message-format=json --test "$1" |
            sed -n "/\"kind\":\[\"test\"\].*\"name\":\"$1\"/s/.*\"executable\":\"\([^\"]*\)\".*/\1/p"
    fi
}

tests="cuda_attention cuda_step cuda_curves"

pack() {
    set -e
    local file folder name
    file=$(realpath -m "$1")
    mkdir -p "$(dirname "$file")"
    cd "$root"
    if [ "${DFAR_BUILT:-0}" != 1 ]; then "${build[@]}"; fi
    stage=$(mktemp -d)
    trap 'rm -rf "$stage"' EXIT
    folder=$stage/dfar-first-day
    mkdir -p "$folder"/{bin,benches,tests,baselines/tests}
    for name in dfar-bench dfar-compare dfar-data; do strip -o "$folder/bin/$name" "$programs/$name"; done
    for name in $tests; do strip -o "$folder/bin/$name" "$(test_program "$name")"; done
    cp benches/first_day.sh "$folder/benches"
    cp -r benches/peers "$folder/benches"
    cp -r tests/golden "$folder/tests"
    cp -r baselines/tests/golden "$folder/baselines/tests"
    git describe --always --abbrev=40 --dirty >"$folder/commit"
    tar --auto-compress -cf "$file" -C "$stage" dfar-first-day
    printf '%s: %s MiB\n' "$file" "$(($(stat -c %s "$file") >> 20))"
}

if [ "${1:-}" = --pack ]; then
    pack "${2:?usage: benches/first_day.sh --pack FILE.tar.gz}"
    exit
fi

out=$(realpath -m "${1:?usage: benches/first_day.sh OUT}")
mkdir -p "$out"
cd "$root"
failures=0
# A test without a usable GPU fails; elsewhere it is skipped.
export DFAR_REQUIRE_GPU=1

# step NAME SECONDS COMMAND...: runs a command, at most so long, unless OUT has its result.
step() {
    local name=$1 limit=$2 status began=$SECONDS
    shift 2
    if grep -q "^$name	0	" "$out/steps.tsv" 2>/dev/null; then return 0; fi
    printf '== %s (at most %s s)\n' "$name" "$limit"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.part" 2>&1
    status=$?
    mv "$out/$name.part" "$out/$name.txt"
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" >>"$out/steps.tsv"
    if [ "$status" != 0 ]; then
        failures=$((failures + 1))
        printf '   FAILED with %s:\n' "$status"
        tail -n 5 "$out/$name.txt" | cut -c1-200
    fi
}

skip() { printf '%s\tSKIPPED\t%s\n' "$1" "$2" >>"$out/steps.tsv"; printf '== %s: SKIPPED: %s\n' "$1" "$2"; }

if [ "$packed" = 0 ] && [ "${DFAR_BUILT:-0}" != 1 ]; then step build 900 "${build[@]}"; fi
bench=$programs/dfar-bench

{
    date -u +%FT%TZ
    cat commit 2>/dev/null || git rev-parse HEAD
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader 2>&1 | head -n 4
} >"$out/environment.txt"

if [ "$small" = 1 ]; then
    tests=cuda_step filter=(nan_survives_the_relu_of_the_library)
    repeats=2 cases=$(mktemp -d) lengths=20 users=8
    trap 'rm -rf "$cases"' EXIT
    cp tests/golden/fha_paper.safetensors tests/golden/dfar_small.safetensors "$cases"
    attention=(--quick --batch-tokens 40 --seq-lens "$lengths")
    steps=(--quick --batches 1 --batch-tokens 24 --batch-rows 64 --max-length 8 --negatives 2)
else
    repeats=1000 cases=tests/golden users=1000
    filter=() attention=() steps=()
fi

# -------------------------------------------------------------------------------------------- checks
for precision in f32 bf16 f16; do
    step "verify_$precision" 300 "$bench" verify "$cases" --device cuda --precision "$precision"
done
step verify_systems 120 "$programs/dfar-compare" verify baselines/tests/golden --device cuda
step systems_data 60 "$programs/dfar-data" synth --users "$users" --output "$out/systems.dfar" --quiet
step train_systems 300 "$programs/dfar-compare" --data "$out/systems.dfar" --systems din,sasrec --seeds 1 --epochs 1 \
    --device cuda --out "$out/systems"
for name in $tests; do step "$name" 240 "$(test_program "$name")" "${filter[@]}"; done
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
# sanitize NAME TOOL ARGUMENTS...: a command of dfar-bench under a tool of compute-sanitizer.
sanitize() {
    local name=sanitizer_$1 tool=$2 options=()
    shift 2
    # A refused graph update, or a call that fails inside a library, is no error of memory.
    if [ "$tool" = memcheck ]; then options=(--report-api-errors no); fi
    if [ -x "$sanitizer" ]; then
        step "$name" 400 "$sanitizer" --tool "$tool" "${options[@]}" --error-exitcode 9 "$bench" "$@"
    else
        skip "$name" "compute-sanitizer is not installed"
    fi
}
for tool in memcheck racecheck; do sanitize $tool $tool verify "$cases" --device cuda; done
# The same bits from every run.
step repeat 240 "$bench" verify "$cases" --device cuda --repeat "$repeats"

# -------------------------------------------------------------------------------------- measurements
step attention_bf16 240 "$bench" attention --device cuda "${attention[@]}" --json "$out/attention_bf16.json"
step attention_f32 180 "$bench" attention --device cuda --precision f32 "${attention[@]}" --json "$out/attention_f32.json"
step attention_masked 180 "$bench" attention --device cuda --normalization masked "${attention[@]}" --json "$out/attention_masked.json"
step train_bf16 120 "$bench" train --device cuda --precision bf16 "${steps[@]}"
step train_f32 120 "$bench" train --device cuda "${steps[@]}"
step train_library 120 "$bench" train --device cuda --precision bf16 --library-products "${steps[@]}"
step train_graphs 120 "$bench" train --device cuda --precision bf16 --cuda-graphs "${steps[@]}"
if [ "$small" = 0 ]; then
    step train_paper 180 "$bench" train --device cuda --precision bf16 --uniform --batch-rows 4096 --max-length 20
    step train_paper_library 180 "$bench" train --device cuda --precision bf16 --uniform --batch-rows 4096 --max-length 20 --library-products
    step train_paper_graphs 180 "$bench" train --device cuda --precision bf16 --uniform --batch-rows 4096 --max-length 20 --cuda-graphs
fi
if python3 -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
    step peers 560 python3 benches/peers/run.py "$out/peers" --golden tests/golden --only attention --limit-s 540
else
    skip peers "PyTorch with CUDA is not installed"
fi

# ----------------------------------------------------------------------------------- more sanitizers
for tool in initcheck synccheck; do sanitize $tool $tool verify "$cases" --device cuda; done
# Launches of several operations in one, and graphs.
sanitize steps memcheck train --device cuda --precision bf16 --cuda-graphs --quick --batches 2 --batch-tokens 24 \
    --batch-rows 64 --max-length 8 --negatives 2

printf '\n'
column -t -s '	' "$out/steps.tsv"
[ "$failures" = 0 ]
