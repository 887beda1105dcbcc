"""Small runs in this process: their configuration, their trainer, and what they have recorded."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from moeyard.parallel.mesh import Mesh
from moeyard.training.read_config import read_run_config
from moeyard.training.run.folder import dump_config
from moeyard.training.trainer import Trainer


class FinishedRun(NamedTuple):
    """A run that has come to its end."""

    trainer: Trainer
    folder: Path


def write_config(folder: Path, **sections: Any) -> Path:
    """Write ``run.yaml`` with ``sections`` and what small runs share; return its path."""
    shared = {
        "run_dir": str(folder / "unset"),
        "optimizer": {"lr": 5e-3, "warmup_steps": 0},
        "checkpoint": {"every": 3},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(shared | sections))
    return path


def trainer(config: Path, run_dir: Path, *overrides: str) -> Trainer:
    """Return the trainer of a configuration with another folder and other values."""
    run_dir.mkdir(exist_ok=True)
    found = read_run_config(config, [f"run_dir={run_dir}", *overrides])
    (run_dir / "config.yaml").write_text(dump_config(found))
    return Trainer(found, run_dir, Mesh())


def finished(config: Path, folder: Path, *overrides: str) -> FinishedRun:
    """Train a run in ``folder`` to its end."""
    run = trainer(config, folder / "run", *overrides)
    run.run()
    return FinishedRun(run, folder / "run")


def check_resumed(config: Path, whole: FinishedRun, folder: Path, *overrides: str) -> None:
    """Check that a copy of a run without its last checkpoint ends with the same bits."""
    run_dir = folder / "run"
    shutil.copytree(whole.folder, run_dir)
    kept, last = sorted((run_dir / "checkpoints").glob("step-*"))[-2:]
    shutil.rmtree(last)
    run = trainer(config, run_dir, *overrides)
    assert run.saves.checkpoints.newest_whole() == kept
    run.run()
    ends = [metrics(one)[-1] for one in (run_dir, whole.folder)]
    for name in ends[0]:
        if name.startswith(("loss", "eval_", "grad_norm")):
            assert ends[0][name] == ends[1][name], name
    for name, weight in whole.trainer.decoder.state_dict().items():
        assert torch.equal(run.decoder.state_dict()[name], weight), name


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
