"""Do the C++ kernels stay inside their memory? The tests of kernels/, under AddressSanitizer.

    python scripts/chaos/kernel_memory.py [PYTEST_ARGUMENTS ...]

Builds the kernels of every instruction set with ``-fsanitize=address`` into a folder that goes away
afterwards and runs the kernels' tests on them: every read or write beyond a tensor, or beyond the
kernels' own scratch memory, ends the run with a report. First it proves that such a read would be
seen. Needs GCC with libasan. Exits 1 where something was found.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/kernels/test_cpp_kernels.py",
    "tests/kernels/test_cpp_attention.py",
    "tests/kernels/test_grouped_linear.py",
    "tests/kernels/test_unwanted_gradients.py",
    "tests/kernels/test_frozen_experts.py",
    "tests/kernels/test_group_sparse.py",
)
BEYOND = """
import ctypes, torch
from moeyard.kernels.cpu.library import functions_for
from moeyard.kernels.cpu.structures import LinearArguments
x, weight, y = torch.ones(1, 64), torch.ones(64, 64), torch.empty(1, 64)
arguments = LinearArguments(0, 1, 64, 64 + 4096, 1, x.data_ptr(), weight.data_ptr(), y.data_ptr())
with torch.no_grad():
    functions_for(x).moeyard_linear(ctypes.byref(arguments))
"""


def environment(folder: Path) -> dict[str, str]:
    """Return one in which the project's own build makes instrumented kernels."""
    compiler = shutil.which("g++")
    if compiler is None:
        sys.exit("g++ is not on the PATH; install it.")
    found = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit("g++ has no libasan; install the package that brings it.")
    wrapper = folder / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O1 -g -fsanitize=address\n')
    wrapper.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "LD_PRELOAD": found,
        # Python keeps memory on purpose, and torch throws through frames that are not ours.
        "ASAN_OPTIONS": "detect_leaks=0:intercept_cxx_throw=0:alloc_dealloc_mismatch=0",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }


def main() -> None:
    """Build, prove that a fault would be seen, and run the tests."""
    with tempfile.TemporaryDirectory() as scratch:
        (folder := Path(scratch) / "home").mkdir(mode=0o700)
        around = environment(folder)
        python = [sys.executable]
        seen = subprocess.run(
            [*python, "-c", BEYOND], env=around, cwd=ROOT, capture_output=True, text=True
        )
        if "AddressSanitizer: heap-buffer-overflow" not in seen.stderr:
            print(seen.stderr[-2000:])
            sys.exit("a read beyond a tensor was not seen, so nothing can be concluded.")
        print("a read beyond a tensor is seen: heap-buffer-overflow", flush=True)
        tests = sys.argv[1:] or [*TESTS, "-q"]
        done = subprocess.run([*python, "-m", "pytest", *tests], env=around, cwd=ROOT)
    sys.exit(1 if done.returncode else 0)


if __name__ == "__main__":
    main()
