#!/usr/bin/env bash
# Check the Triton kernels on this machine's GPU and measure them; unattended, under 10 minutes.
#
#     benchmarks/gpu.sh [FOLDER]      # FOLDER gets a copy of what was found
#
# MEGABLOCKS_SOURCES names a folder with source archives of megablocks, grouped_gemm and stanford-stk
# (docs/backends.md): they are built beside the tests, and left out where that fails.
#
# Needs a python3 (or $PYTHON) with PyTorch's CUDA build, pytest and numpy; moeyard need not be
# installed.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
found="${1:-$(mktemp -d)}"
mkdir -p "$found"
# The root is the package: a link of that name makes it importable uninstalled.
link="$(mktemp -d)"
trap 'rm -rf "$link"' EXIT
ln -s "$PWD" "$link/moeyard"
export PYTHONPATH="$link${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python sees no CUDA device; run this where there is one" >&2
    exit 2
fi

# Into a folder of its own, so that the Python that runs this stays as it is.
build=""
if [ -n "${MEGABLOCKS_SOURCES:-}" ]; then
    timeout 170 "$python" -m pip install --quiet --no-deps --no-index --no-build-isolation \
        --target "$link/megablocks_build" "$MEGABLOCKS_SOURCES"/*.tar.gz \
        > "$found/megablocks_build.txt" 2>&1 &
    build=$!
fi

# Compiling takes most of the tests' time, so several processes share them. What passed in the
# interpreter can still be miscompiled; figures of kernels that fail are worth nothing.
files=(test_triton_gpu test_triton_gpu test_triton_gpu test_triton_gpu)
parts=(bfloat16 "float16 and not bfloat16" float32 "not float16 and not float32")
files+=(test_triton_quantized_gpu test_triton_quantized_gpu test_triton_quantized_gpu)
parts+=(bfloat16 "float16 and not bfloat16" "not float16")
files+=(test_triton_descriptors_gpu test_triton_router_gpu)
parts+=(test test)
pids=()
for number in "${!parts[@]}"; do
    timeout 170 "$python" -m pytest -q --noconftest -p no:cacheprovider -m gpu \
        "tests/kernels/${files[$number]}.py" -k "${parts[$number]}" \
        > "$found/tests_$number.txt" 2>&1 &
    pids+=($!)
done
passed=0
for number in "${!parts[@]}"; do
    wait "${pids[$number]}" || { passed=1; grep -E '^(FAILED|ERROR|E  )' "$found/tests_$number.txt"; }
    tail -n 1 "$found/tests_$number.txt"
done

if [ -n "$build" ] && wait "$build"; then
    export PYTHONPATH="$PYTHONPATH:$link/megablocks_build"
    timeout 60 "$python" -m pytest -q -rs --noconftest -p no:cacheprovider -m gpu \
        tests/kernels/test_megablocks.py 2>&1 | tee "$found/tests_megablocks.txt"
elif [ -n "$build" ]; then
    echo "MegaBlocks could not be built here; going on without (see $found/megablocks_build.txt)"
fi

timeout 60 "$python" benchmarks/router.py --device cuda --budget-s 40 |
    tee benchmarks/results/router_cuda.txt
cp benchmarks/results/router_cuda.* "$found"
timeout 270 "$python" benchmarks/expert_mlp.py --device cuda --budget-s 240 |
    tee benchmarks/results/expert_mlp_cuda.txt
cp benchmarks/results/expert_mlp_cuda.* "$found"
[ "$passed" = 0 ] || echo "error: tests failed on this GPU; see $found/tests_*.txt" >&2
exit "$passed"
