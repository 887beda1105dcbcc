"""benchmarks/offloading.py runs every arm that this machine has, and leaves no group behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(GROUPS / "memory.limit_in_bytes", os.R_OK),
    reason="needs root and cgroups v1",
)
def test_every_arm_runs_on_tiny_models(tmp_path):
    def python(name: str, *more: str) -> str:
        command = [sys.executable, str(BENCHMARKS / name), str(tmp_path), *more]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    before = set(GROUPS.glob("moeyard-offloading-*"))
    python("offloading_models.py", "tiny", "tiny-pregated", "tiny-preattention")
    shown = python("offloading.py", "--dry")
    for arm in ("on demand", "next_gates", "oracle 0.7", "everything on", "reads begin early"):
        assert f"\n  {arm} " in shown
    assert "status" not in shown and "killed" not in shown
    assert set(GROUPS.glob("moeyard-offloading-*")) <= before
