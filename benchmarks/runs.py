"""Training runs of benchmarks: started as a user would, resumed when a benchmark starts again."""

import json
import os
import subprocess
import sys
from pathlib import Path


def train(
    config: Path,
    run_dir: Path,
    overrides: list[str],
    steps: int,
    threads: int,
    measure: str = "eval_loss_per_byte",
) -> list[dict]:
    """Train to step ``steps``, or continue an earlier run, and return its records.

    The last one has ``measure``, of held-out data.
    """
    records = read_metrics(run_dir)
    if not records or records[-1]["step"] < steps:
        run_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "moeyard.training", str(config), f"run_dir={run_dir}"]
        with (run_dir / "log.txt").open("a") as log:
            subprocess.run(
                [*command, f"train.steps={steps}", *overrides],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=log,
                check=True,
            )
        records = read_metrics(run_dir)
    assert measure in records[-1], f"{run_dir} ended without a final evaluation"
    return records


def read_metrics(run_dir: Path) -> list[dict]:
    """Return the records of a run so far."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
