#!/usr/bin/env bash
# Prove and time this machine's GPU at work, without a network, in at most 9 minutes:
#
#     bench/gpu.sh [smoke | search | kernels | cohorts] [folder] [--only ...]
#                                                        default: smoke bench/results
#
# What stands behind the folder goes to the first program of the parts: `search DIR --only 8B graphs`,
# `kernels DIR --only paged_attention`.
#
# smoke: does it work? Versions, a few searches, what a round asks of the device, how often half
#        precision differs; the tests marked `gpu`; the sanitizer over small kernels.
# search: whole searches of known shapes beside transformers, the search as released, and the limit.
# kernels: every operator against its limit, what its first use takes, and the tests that draw shapes.
# cohorts: from how many rows on two cohorts of requests are faster than one; and what a pass of a
#        model with and without an adapter takes.
#
# Needs python with torch, triton, transformers, pytest, hypothesis and pybind11, a C++ compiler,
# and nvcc for the CUDA sources, and builds in place. A part that fails hides no other, and one that
# runs out of time keeps what it has; the last lines say how each ended, and the last it said.
# W2S_FAST_DRY_RUN=1 runs the same parts with tiny shapes on the CPU, with what was built before.
set -u
cd "$(dirname "$0")/.." || exit 1
what=${1:-smoke}
out=${2:-bench/results}
more=("${@:3}")
case $what in smoke | search | kernels | cohorts) ;; *) echo "no such parts: $what" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
dry=()
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' ' '-')
if [ -n "${W2S_FAST_DRY_RUN:-}" ]; then dry=(--dry-run) gpu=dry; fi
name=$(date +%Y-%m-%d)${gpu:+-$gpu}
mkdir -p "$out"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
summary=()
status=0

part() { # part NAME SECONDS COMMAND...
    local title=$1 seconds=$2 begin=$SECONDS
    shift 2
    printf '\n== %s\n' "$title"
    timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee "$log"
    local code=${PIPESTATUS[0]} verdict="ok"
    case $code in
        0) ;;
        124 | 130 | 137) verdict="FAILED: still running after $seconds s" ;;
        *) verdict="FAILED: exit code $code" ;;
    esac
    [ "$code" -eq 0 ] || status=1
    say "$title" $((SECONDS - begin)) "$verdict" "$(grep -v '^[[:space:]]*$' "$log" | tail -n 1)"
}

say() { # say NAME SECONDS VERDICT WORDS
    summary+=("$(printf '%-13s %4d s  %s  %.220s' "$1" "$2" "$3" "$4")")
}

export PYTHONUNBUFFERED=1
if [ ${#dry[@]} -gt 0 ]; then # others may be running what stands here
    part "build" 60 ls w2s_fast/_pages*.so
else
    # shellcheck disable=SC2016
    part "build" 80 bash -c '"$0" setup.py --quiet build_ext --inplace || exit 1
        ls w2s_fast/_cuda*.so || { echo "NO CUDA LIBRARY: csrc/*.cu was not built"; exit 1; }' "$python"
fi

# pytest in as many workers as there are, up to 12.
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(--numprocesses 12 --dist worksteal); fi
test=("$python" -m pytest -q -p no:cacheprovider)

case $what in
smoke)
    part "smoke" 120 "$python" -m bench.smoke "${dry[@]}" --seconds 90 --out "$out/$name-smoke.json"
    small=("$python" -m bench.first_use --small --seconds 40
        --only sample_tokens select_beams score_select paged_attention)
    sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    if [ ${#dry[@]} -gt 0 ]; then
        part "tests" 60 "${test[@]}" tests/gpu/test_copy_pages.py
    else
        part "tests" 160 "${test[@]}" "${workers[@]}" tests/gpu tests/csrc/test_copy_pages.py \
            --ignore tests/gpu/test_failed_captures.py --junitxml "$out/$name-tests.xml"
        # Alone, since they take most of the device's memory.
        part "captures" 60 "${test[@]}" tests/gpu/test_failed_captures.py \
            --junitxml "$out/$name-captures.xml"
        if [ -x "$sanitizer" ]; then
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "sanitizer" 60 \
                "$sanitizer" --tool memcheck --error-exitcode 9 "${small[@]}"
        else
            say "sanitizer" 0 "left out" "there is no compute-sanitizer here"
        fi
    fi
    ;;
search)
    part "search" 430 "$python" -m bench.end_to_end "${dry[@]}" --seconds 390 \
        --out "$out/$name-search.json" "${more[@]}"
    ;;
kernels)
    part "timings" 190 "$python" -m bench.kernels "${dry[@]}" --seconds 160 \
        --out "$out/$name-kernels.json" "${more[@]}"
    first=(--out "$out/$name-first-use.json")
    if [ ${#dry[@]} -gt 0 ]; then first+=(--small); fi
    cache=$(mktemp -d)
    TRITON_CACHE_DIR=$cache part "first use" 70 "$python" -m bench.first_use "${first[@]}"
    rm -rf "$cache"
    if [ ${#dry[@]} -eq 0 ]; then
        part "drawn shapes" 150 "${test[@]}" "${workers[@]}" tests/interpret \
            --junitxml "$out/$name-drawn-tests.xml"
    fi
    ;;
cohorts)
    part "cohorts" 330 "$python" -m bench.cohorts "${dry[@]}" --seconds 240 \
        --out "$out/$name-cohorts.json"
    part "adapters" 80 "$python" -m bench.adapters "${dry[@]}" --seconds 50 \
        --out "$out/$name-adapters.json"
    ;;
esac

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$status"
