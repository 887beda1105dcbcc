"""The Triton kernels in Triton's interpreter, on the CPU.

The mode is fixed when Triton is imported, so the cases run in separate processes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no package for this system")


PARTS = {"triton_cases": 60, "triton_quantized_cases": 35, "triton_router_cases": 50}
"""The files of cases, and the least number of cases in each."""


@pytest.fixture(scope="module")
def running():
    """Run all files in parallel, one single-threaded process each: tiles are small."""
    processes = {}
    for name in PARTS:
        cases = Path(__file__).with_name(f"{name}.py")
        processes[name] = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", cases],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("part", PARTS)
def test_kernels_agree_with_the_reference_in_the_interpreter(running, part):
    output, _ = running[part].communicate()
    assert running[part].returncode == 0, output[-8000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= PARTS[part], output
    assert "skipped" not in output
