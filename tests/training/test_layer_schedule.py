"""A run that measures its links: what it records, and what observers make of that."""

import json
from pathlib import Path

import pytest

from moeyard.training.observers.observers import scalars

from launch import moeyard_train

RECORD = {
    "loss": 1.0,
    "balance": 0.0,
    "z": 0.0,
    "grad_norm": 1.0,
    "lr": 0.1,
    "tokens": 1,
    "tokens_per_s": 1.0,
    "phases_s": {},
    "moe_layers": [],
    "load": [],
}


def test_observers_show_chunks_fit_and_errors():
    compared = {"predicted_s": 0.2, "measured_s": 0.25, "relative_error": -0.2}
    schedule = {
        "chunks": 4,
        "backward_chunks": 2,
        "contention": 0.5,
        "r2": {"dispatch": 0.99},
        "phases": {"forward": compared},
    }
    tags = scalars(RECORD | {"schedule": schedule})
    assert tags["schedule/chunks"] == 4 and tags["schedule/backward_chunks"] == 2
    assert tags["schedule_r2/dispatch"] == 0.99 and tags["schedule/contention"] == 0.5
    assert tags["schedule_relative_error/forward"] == -0.2
    assert not any("schedule" in tag for tag in scalars(RECORD))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_a_run_records_its_schedule(tmp_path, config_file, dense):
    run_dir = tmp_path / "run"
    overrides = [
        f"run_dir={run_dir}",
        "train.steps=4",
        "train.log_every=1",
        "parallel.ep=2",
        "parallel.chunks=auto",
        "parallel.profile_every=2",
        f"parallel.dense={dense}",
        "model.moe.d_shared=8",
    ]
    moeyard_train(str(config_file), "--nproc", "2", *overrides)
    lines = Path(run_dir / "metrics.jsonl").read_text().splitlines()
    schedules = [json.loads(line)["schedule"] for line in lines]
    assert len(schedules) == 4
    for schedule in schedules:
        assert schedule["chunks"] in (1, 2, 4, 8)
        assert set(schedule["r2"]) >= {"dispatch", "combine", "experts", "gradients"}
        assert schedule["phases"]["backward"]["measured_s"] > 0
