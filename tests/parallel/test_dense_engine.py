"""Dense engines on one process; on several they are compared in test_equivalence.py."""

from typing import cast, get_args

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moeyard.moe.experts.resident import Experts
from moeyard.parallel.dense.gradients import MainGradients
from moeyard.parallel.dense.table import ENGINES, open_engine
from moeyard.parallel.mesh import Mesh
from moeyard.training.config import ParallelConfig


def test_the_configuration_names_the_engines_that_there_are():
    assert set(get_args(ParallelConfig.model_fields["dense"].annotation)) == set(ENGINES)


@pytest.mark.parametrize("kind", ENGINES)
def test_one_process_gets_whole_sums_of_its_micro_batches_from_every_kind(kind):
    model = nn.Linear(3, 2, dtype=torch.float64)
    engine = open_engine(kind, Mesh())
    engine.place(model, torch.device("cpu"))
    assert not engine.own_masters(model)
    wrapped = engine.wrap(model, model, torch.float64, torch.device("cpu"))
    batches = torch.arange(12, dtype=torch.float64).view(2, 2, 3)
    engine.gradients.zero()
    with engine.accumulating():
        engine.backward(wrapped(batches[0]).sum())
    engine.backward(wrapped(batches[1]).sum())
    engine.gradients.reduce()
    assert model.weight.grad is None
    assert torch.equal(model.weight.main_grad, batches.sum((0, 1)).expand(2, 3))
    assert torch.equal(model.bias.main_grad, torch.full((2,), 4.0, dtype=torch.float64))
    by_hand = torch.cat([model.weight.main_grad.flatten(), model.bias.main_grad]).norm()
    assert engine.gradients.norm() == pytest.approx(float(by_hand), rel=1e-12)


def test_a_group_of_one_rank_sums_nothing(monkeypatch):
    """NCCL would open a communicator for it."""
    experts = Experts(4, 3, 2)
    group = cast(dist.ProcessGroup, "a group")
    gradients = MainGradients(nn.ModuleList([experts]), Mesh(edp_group=group, experts_group=group))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("it sums"))
    for parameter in experts.parameters():
        parameter.main_grad.fill_(2)
    gradients.reduce()
    numel = sum(parameter.numel() for parameter in experts.parameters())
    assert float(gradients.norm()) == pytest.approx(2 * numel**0.5)
