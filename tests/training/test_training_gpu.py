"""Training on a GPU: the losses of the same run on the CPU, also after it is resumed."""

import json
import os
import shutil
import sys

import pytest
import torch

from launch import run

pytestmark = pytest.mark.gpu


def train(config_file, run_dir, *overrides, devices=None):
    """Run the training program, on the CPU where ``devices`` is empty, and return its records."""
    command = [sys.executable, "-m", "moeyard.training", str(config_file), f"run_dir={run_dir}"]
    if devices is None:
        everyone = ",".join(str(number) for number in range(torch.cuda.device_count()))
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", everyone)
    run([*command, *overrides], 150, CUDA_VISIBLE_DEVICES=devices)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("recompute", ["false", "true", "experts"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_a_run_on_a_gpu_has_the_losses_of_the_cpu(
    tmp_path, config_file, precision, tolerance, recompute
):
    recomputes = f"train.recompute={recompute}"
    overrides = ("train.steps=12", f"train.precision={precision}", recomputes)
    expected = train(config_file, tmp_path / "cpu", *overrides, devices="")
    found = train(config_file, tmp_path / "gpu", *overrides)
    assert len(found) == len(expected) == 12
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)


def test_a_resumed_run_on_a_gpu_goes_on_as_the_unbroken_one(tmp_path, config_file):
    whole = train(config_file, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    again = train(config_file, tmp_path / "run")
    assert [r["step"] for r in again] == [r["step"] for r in whole] == list(range(1, 7))
    for ours, unbroken in zip(again, whole, strict=True):
        assert ours["loss"] == pytest.approx(unbroken["loss"], rel=1e-6)
