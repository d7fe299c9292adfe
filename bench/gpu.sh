#!/usr/bin/env bash
# Prove and time this machine's GPU at work, without a network:
#
#     bench/gpu.sh [folder for the results] [kernels | engine | cohorts]
#                                                             default: bench/results kernels
#
# Needs python with torch, triton, transformers, pytest, hypothesis and pybind11, a C++ compiler,
# and nvcc for the CUDA sources. Builds in place, runs the tests marked `gpu`, times every kernel;
# or, for `engine`, proves and times recorded passes; or, for `cohorts`, finds from how many rows on
# two of them are faster than one. At most 8 minutes each. A part that fails hides no other; the last
# lines say how each part ended.
# W2S_FAST_DRY_RUN=1 runs the same parts with tiny shapes on the CPU, with what was built before.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-bench/results}
what=${2:-kernels}
case $what in kernels | engine | cohorts) ;; *) echo "no such parts: $what" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
name=$(date +%Y-%m-%d)-$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' ' '-')
name=${name%-}
mkdir -p "$out"
summary=()
status=0

part() { # part NAME SECONDS COMMAND...
    local title=$1 seconds=$2
    shift 2
    printf '\n== %s\n' "$title"
    local begin=$SECONDS
    timeout "$seconds" "$@"
    local code=$?
    local verdict="ok"
    if [ "$code" -eq 124 ]; then verdict="FAILED: still running after $seconds s"
    elif [ "$code" -ne 0 ]; then verdict="FAILED: exit code $code"; fi
    [ "$code" -eq 0 ] || status=1
    summary+=("$(printf '%-22s %4d s  %s' "$title" $((SECONDS - begin)) "$verdict")")
}

export PYTHONUNBUFFERED=1
if [ -n "${W2S_FAST_DRY_RUN:-}" ]; then # others may be running what stands here
    part "build" 90 "$python" -c "import w2s_fast._pages"
else
    part "build" 90 "$python" setup.py --quiet build_ext --inplace
fi
if [ "$what" = engine ] && [ -n "${W2S_FAST_DRY_RUN:-}" ]; then
    part "ways to decode" 300 "$python" -m bench.decode --dry-run --out "$out/$name-decode-dry.json"
elif [ "$what" = engine ]; then
    part "graphs on the device" 150 "$python" -m pytest -q -m gpu tests/gpu/test_graphs.py \
        --junitxml "$out/$name-graph-tests.xml"
    part "captures that fail" 60 "$python" -m pytest -q -m gpu tests/gpu/test_failed_captures.py \
        --junitxml "$out/$name-capture-tests.xml"
    part "ways to decode" 230 "$python" -m bench.decode --seconds 150 --out "$out/$name-decode.json"
elif [ "$what" = cohorts ] && [ -n "${W2S_FAST_DRY_RUN:-}" ]; then
    part "cohorts" 120 "$python" -m bench.cohorts --dry-run --out "$out/$name-cohorts-dry.json"
elif [ "$what" = cohorts ]; then
    part "cohorts" 380 "$python" -m bench.cohorts --seconds 240 --out "$out/$name-cohorts.json"
elif [ -n "${W2S_FAST_DRY_RUN:-}" ]; then
    part "timings" 120 "$python" -m bench.kernels --dry-run --out "$out/$name-kernels-dry.json"
else
    part "kernels on the device" 100 "$python" -m pytest -q -m gpu tests/gpu/test_kernels.py \
        --junitxml "$out/$name-kernel-tests.xml"
    part "search on the device" 50 "$python" -m pytest -q -m gpu tests/gpu/test_search.py \
        --junitxml "$out/$name-search-tests.xml"
    part "page copies" 30 "$python" -m pytest -q \
        tests/csrc/test_copy_pages.py tests/gpu/test_copy_pages.py
    part "timings" 130 "$python" -m bench.kernels --seconds 100 --out "$out/$name-kernels.json"
    part "kernels, drawn shapes" 80 "$python" -m pytest -q tests/interpret \
        --junitxml "$out/$name-drawn-tests.xml"
fi

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$status"
