"""The balancing bias of a router over a run: moved once a step, kept by resume and export."""

import shutil

import torch

import moeyard
from moeyard.parallel.mesh import Mesh
from moeyard.training.checkpoints.export import export
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

BIASED = (
    "model.moe.router={kind: topk, k: 2, score: sigmoid, bias_update_rate: 0.01, balance_loss: 0}"
)


def trainer(config_file, run, *overrides) -> Trainer:
    config = read_run_config(config_file, [f"run_dir={run}", BIASED, *overrides])
    run.mkdir(exist_ok=True)
    return Trainer(config, run, Mesh())


def biases(decoder) -> list[torch.Tensor]:
    return [router.e_score_correction_bias for router in decoder.routers()]


def test_a_step_moves_the_bias_once_by_the_counts_of_the_whole_batch(config_file, tmp_path):
    run = trainer(config_file, tmp_path / "run", "train.accumulation=2", "train.recompute=true")
    result = run._step.run(0, stop_requested=False)
    assert result.counts_LE.sum(dim=1).tolist() == [8 * 32 * 2] * 2
    for bias_E, counts_E in zip(biases(run.decoder), result.counts_LE.double(), strict=True):
        torch.testing.assert_close(bias_E.double(), 0.01 * (counts_E.mean() - counts_E).sign())


def test_resume_and_export_keep_the_bias_and_its_rate_may_end(config_file, tmp_path):
    unbroken = trainer(config_file, tmp_path / "whole")
    unbroken.run()
    expected = [bias.clone() for bias in biases(unbroken.decoder)]
    assert all(bias.abs().max() > 0 for bias in expected)

    run = tmp_path / "run"
    trainer(config_file, run).run()
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    resumed = trainer(config_file, run)
    resumed.run()
    assert all(map(torch.equal, biases(resumed.decoder), expected))

    still = ["model.moe.router.bias_update_rate=0", "train.steps=8"]
    later = trainer(config_file, run, *still)
    later.run()
    assert all(map(torch.equal, biases(later.decoder), expected))

    export(run, tmp_path / "model")
    model = moeyard.load(tmp_path / "model")
    assert all(map(torch.equal, biases(model.decoder), expected))
