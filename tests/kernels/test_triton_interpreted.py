"""The Triton kernels in Triton's interpreter, on the CPU.

The mode is fixed when Triton is imported, hence a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no package for this system")


def test_kernels_agree_with_the_reference_in_the_interpreter():
    parts = ("", "_quantized", "_router")
    cases = [Path(__file__).with_name(f"triton{part}_cases.py") for part in parts]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *cases],
        # One thread: the interpreter's tiles are small, and other tests run beside it.
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 100, done.stdout
    assert "skipped" not in done.stdout
