"""Replicas are replaced and killed under load: nothing is lost, no stream ends in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_model import CONFIG, write_random_model

PROGRAM = Path(__file__).parent.parent.parent / "benchmarks" / "serve_resilience.py"


@pytest.mark.slow
def test_nothing_is_lost_when_replicas_are_replaced_or_killed_under_load(tmp_path):
    folder = tmp_path / "long"
    write_random_model(folder, CONFIG.model_copy(update={"max_positions": 8192}))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "ended with an error event" in done.stdout, "no stream was cut: nothing was shown"
