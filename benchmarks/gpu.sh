#!/usr/bin/env bash
# Check this machine's GPU and measure it, unattended.
#
#     benchmarks/gpu.sh FOLDER check measure     # about 10 minutes on one GPU; FOLDER gets all
#     benchmarks/gpu.sh FOLDER ranks             # training on all GPUs, in every way
#     benchmarks/gpu.sh FOLDER tiles             # 3 minutes: other tiles than those shipped
#     benchmarks/gpu.sh FOLDER dry               # without a GPU: ranks on 2 CPU processes
#
# check runs the tests of kernels, models and training that need a GPU, and then ranks. ranks trains
# on 1, 2, 4 and 8 GPUs, as far as there are so many, and compares with one CPU process
# (benchmarks/gpu_ranks.py). measure times the router and the expert MLP against their peers. dry
# shows that this script and the arms of ranks work before they are taken to a machine with GPUs.
#
# MEGABLOCKS_SOURCES names a folder with archives or wheels of megablocks, grouped_gemm and
# stanford-stk (docs/backends.md): they are built next to the tests, into FOLDER/megablocks, and left
# out if that fails.
#
# Needs a python3 (or $PYTHON) with PyTorch's CUDA build, transformers, pydantic and pytest, and
# pytest-xdist for speed; moeyard need not be installed.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
found="${1:?a folder for what was found}"
shift
mkdir -p "$found"
# The root is the package: a link of that name makes it importable uninstalled.
link="$(mktemp -d)"
trap 'rm -rf "$link"' EXIT
ln -s "$PWD" "$link/moeyard"
export PYTHONPATH="$link${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
processes="$(nproc)"
failed=0

if [ "$*" != dry ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python sees no CUDA device; run this where there is one" >&2
    exit 2
fi

# tests SECONDS NAME ARGUMENTS...: run some tests and keep what they print.
tests() {
    local seconds="$1" name="$2"
    shift 2
    timeout "$seconds" "$python" -m pytest -v -p no:cacheprovider -m gpu --durations=5 "$@" \
        > "$found/tests_$name.txt" 2>&1 || failed=1
    grep -E '^(FAILED|ERROR|E  )' "$found/tests_$name.txt"
    echo "$name: $(tail -n 1 "$found/tests_$name.txt")"
}

check() {
    local build="" kernels=(tests/kernels/test_triton_*gpu.py) workers=()
    # Into a separate folder, so that the Python that runs this does not change.
    if [ -n "${MEGABLOCKS_SOURCES:-}" ]; then
        { timeout 150 "$python" -m pip wheel --no-deps --no-index --no-build-isolation \
            --wheel-dir "$found/megablocks" "$MEGABLOCKS_SOURCES"/* &&
            "$python" -m pip install --quiet --no-deps --no-index \
                --target "$link/megablocks_build" "$found"/megablocks/*.whl
        } > "$found/megablocks_build.txt" 2>&1 &
        build=$!
    fi
    # Compiling takes most of the time, so many processes share it; two tests need most of the
    # GPU's memory and run alone.
    if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n "$processes"); fi
    tests 300 kernels --noconftest "${workers[@]}" -k "not wrap" "${kernels[@]}"
    tests 60 large --noconftest -k wrap "${kernels[@]}"
    MOEYARD_CPU_KERNELS=off tests 240 models "${workers[@]}" tests/moe/test_families_gpu.py \
        tests/training/test_training_gpu.py
    if [ -n "$build" ] && wait "$build"; then
        export PYTHONPATH="$PYTHONPATH:$link/megablocks_build"
        tests 60 megablocks --noconftest tests/kernels/test_megablocks.py
    elif [ -n "$build" ]; then
        echo "MegaBlocks could not be built here; going on without (see megablocks_build.txt)"
    fi
    ranks
}

ranks() {
    timeout "${RANKS_S:-3000}" "$python" benchmarks/gpu_ranks.py --out "$found/ranks" || failed=1
}

dry() {
    "$python" -m pytest -q -p no:cacheprovider -m gpu --collect-only \
        tests/moe/test_families_gpu.py tests/training/test_training_gpu.py > "$found/collected.txt" ||
        failed=1
    "$python" benchmarks/gpu_ranks.py --out "$found/ranks" --cpu "${DRY_RANKS:-2}" || failed=1
}

# kept SECONDS NAME COMMAND...: run a benchmark and keep its figures.
kept() {
    local seconds="$1" name="$2"
    shift 2
    timeout "$seconds" "$python" "$@" 2>&1 | tee "benchmarks/results/$name.txt"
    cp "benchmarks/results/$name".* "$found"
}

measure() {
    kept 60 router_cuda benchmarks/router.py --device cuda --budget-s "${ROUTER_S:-30}"
    kept 270 expert_mlp_cuda benchmarks/expert_mlp.py --device cuda --budget-s "${MLP_S:-220}"
}

tiles() {
    kept 200 tiles_cuda benchmarks/tiles.py --processes "$processes" --budget-s "${TILES_S:-150}"
}

for part in "$@"; do
    case "$part" in
        check | ranks | measure | tiles | dry) "$part" ;;
        *) echo "error: $part is no part; use check, ranks, measure, tiles or dry" >&2; failed=2 ;;
    esac
done
[ "$failed" = 0 ] || echo "error: something failed; see tests_*.txt and ranks/ in $found" >&2
exit "$failed"
