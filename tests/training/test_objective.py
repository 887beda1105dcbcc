"""An objective of one's own trains from Python: the trainer knows no kind by name."""

import json

import pytest
import torch
import torch.nn.functional as F

from moeyard.moe.batch import batch_of_rows
from moeyard.parallel.mesh import Mesh
from moeyard.training.objectives.next_token import NextTokenObjective
from moeyard.training.objectives.objective import MicroBatchLoss
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer


class LastHalf(torch.nn.Module):
    """Cross-entropy of the second half of each window, as of the answer to a prompt."""

    def __init__(self, decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, windows_BL1):
        half = windows_BL1.shape[1] // 2
        output = self.decoder(batch_of_rows(windows_BL1[:, :-1]))
        logits_BLV = self.decoder.logits(output.hidden_TD).unflatten(0, (len(windows_BL1), -1))
        targets = windows_BL1[:, -half:].flatten()
        loss = F.cross_entropy(logits_BLV[:, -half:].flatten(0, 1), targets, reduction="sum")
        return MicroBatchLoss(loss, len(targets), output.routings)


class LastHalfObjective(NextTokenObjective):
    """Text as for the next token; fewer targets."""

    def module(self, decoder):
        return LastHalf(decoder)

    def divisor(self, step):
        return self.config.train.batch_sequences * (self.config.train.sequence_length // 2)


PLAIN = ["train.precision=fp64", "model.moe.router={kind: topk, k: 2, balance_loss: 0, z_loss: 0}"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_objective_decides_loss_divisor_and_gradients(tmp_path, config_file, accumulation):
    options = [f"run_dir={tmp_path}/run", *PLAIN, f"train.accumulation={accumulation}"]
    config = read_run_config(config_file, options)
    run = Trainer(config, tmp_path / "run", Mesh(), objective=LastHalfObjective)
    decoder = run.decoder
    windows = run._data.train.sequences(0, range(config.train.batch_sequences))
    half = config.train.sequence_length // 2
    logits_TV = decoder.logits(decoder(batch_of_rows(windows[:, :-1])).hidden_TD)
    losses_BL = F.cross_entropy(logits_TV, windows[:, 1:].reshape(-1), reduction="none").view(
        len(windows), -1
    )
    expected = float(losses_BL[:, -half:].mean().detach())
    parameters = [p for n, p in decoder.named_parameters() if ".experts." not in n]
    gradients = torch.autograd.grad(losses_BL[:, -half:].mean(), parameters)

    found, scale = [], run._step.gradients.scale_
    run._step.gradients.scale_ = lambda factor: (
        found.extend(p.main_grad.clone() for p in parameters),
        scale(factor),
    )
    assert run._step.run(0, stop_requested=False).loss == pytest.approx(expected, rel=1e-12)
    for gradient, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_a_run_records_what_its_objective_measures(tmp_path, config_file):
    class Named(LastHalfObjective):
        def evaluate(self, module, mesh):
            held_out = super().evaluate(module, mesh)
            held_out.metrics["eval_perplexity"] = 2.0
            return held_out

    (tmp_path / "run").mkdir()
    config = read_run_config(config_file, [f"run_dir={tmp_path}/run", "train.steps=2"])
    Trainer(config, tmp_path / "run", Mesh(), objective=Named).run()
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_perplexity"] == 2.0 and {"eval_loss", "eval_loss_per_byte"} < last.keys()
