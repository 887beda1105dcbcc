"""A trainer in this process, and what its run has recorded."""

import json
from pathlib import Path
from typing import Any

from moeyard.parallel.mesh import Mesh
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer


def trainer(config: Path, run_dir: Path, *overrides: str) -> Trainer:
    """Return the trainer of a configuration with another folder and other values."""
    run_dir.mkdir(exist_ok=True)
    found = read_run_config(config, [f"run_dir={run_dir}", *overrides])
    return Trainer(found, run_dir, Mesh())


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
