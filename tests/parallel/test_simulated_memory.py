"""Activations on paper against the tensors that autograd saves of a real forward."""

import pytest
import torch
from simulation_cases import cluster_of, model_of, work_of

from moeyard.moe.models.decoder import Decoder
from moeyard.parallel.simulation.memory import activations
from moeyard.parallel.simulation.workload import Fold
from moeyard.training.objectives.next_token import NextToken


def saved_bytes(decoder: Decoder, windows_BL1: torch.Tensor) -> int:
    """Return the bytes of storages that autograd keeps of a forward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        NextToken(decoder)(windows_BL1)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "changes, recompute",
    [
        ({}, False),
        ({}, "experts"),
        ({"d_ff": 200, "dense_layers": (0, 1)}, False),
        ({"attention": {"qk_norm": None}}, False),
        ({"moe": {"num_experts": 4, "d_expert": 64, "d_shared": 96}}, False),
    ],
)
def test_activations_are_those_that_autograd_saves(changes, recompute):
    model = model_of(**{"d_model": 64, "num_heads": 4, "vocab_size": 300, **changes})
    work = work_of(
        model,
        sequence_length=128,
        batch_sequences=2,
        precision="fp32",
        recompute=recompute,
        ep=1,
    )
    decoder = Decoder(model, recompute=recompute)
    measured = saved_bytes(decoder, torch.randint(300, (2, 129)))
    fold = Fold.of(work, cluster_of(), 1)
    predicted = activations(work, fold, fold.tokens * 2.0, 0.0, on_cpu=True)
    predicted -= 2 * 4 * fold.tokens * 300  # the scores' gradients, which backward makes
    assert predicted == pytest.approx(measured, rel=0.03)
