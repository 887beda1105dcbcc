"""Dense engines on one process; on several they are compared in test_equivalence.py."""

from typing import get_args

import pytest
import torch
from torch import nn

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
