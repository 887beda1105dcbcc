"""Frozen experts with low-rank updates: values and gradients of plain autograd over W + s B A.

T tokens, K choices, E experts, S slots, D model width, F expert width, P rank.
"""

from dataclasses import replace

import pytest
import torch

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.frozen_experts import frozen_expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.frozen import FrozenExperts
from moeyard.kernels.values.low_rank import LowRank

T, K, E, D, F, P, SCALE = 37, 3, 6, 10, 8, 2, 1.7
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Largest difference over the largest expected value."""
SLOTS = {"all_here": None, "half_here": (-1, 2, -1, 0, 1, -1)}


def draw(*shape, dtype, generator, scale=1.0):
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def case(dtype, slot_of_E, empty=()):
    """Return all tensors that may require gradients, the ids, and the frozen experts."""
    generator = torch.Generator().manual_seed(5)
    num_slots = E if slot_of_E is None else 3
    kw = {"dtype": dtype, "generator": generator}
    present = [e for e in range(E) if slot_of_E is None or slot_of_E[e] >= 0]
    ids = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K].to(torch.int32)
    ids[~torch.isin(ids, torch.tensor([e for e in present if e not in empty]))] = -1
    ids[3] = -1
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        "x": draw(T, D, **kw),
        "weights": weights.to(wide),
        "fc1_a": draw(num_slots, 2 * P, D, **kw, scale=D**-0.5),
        "fc1_b": draw(num_slots, 2 * F, P, **kw, scale=0.5),
        "fc2_a": draw(num_slots, P, F, **kw, scale=F**-0.5),
        "fc2_b": draw(num_slots, D, P, **kw, scale=0.5),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    fc1 = draw(num_slots, 2 * F, D, **kw, scale=D**-0.5)
    fc2 = draw(num_slots, D, F, **kw, scale=F**-0.5)
    return leaves, ids, ExpertWeights(fc1, fc2, slot_of_E=slot_of_E)


here = FrozenExperts.in_memory


def low_rank(leaves):
    return LowRank(*(leaves[name] for name in ("fc1_a", "fc1_b", "fc2_a", "fc2_b")), SCALE)


def expected_of(leaves, ids, experts):
    """The reference over W + s B A, in fp64."""
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    gate_a, up_a = wide["fc1_a"].chunk(2, dim=1)
    gate_b, up_b = wide["fc1_b"].chunk(2, dim=1)
    update1 = torch.cat((gate_b @ gate_a, up_b @ up_a), dim=1)
    fc1 = experts.fc1_SHD.double() + SCALE * update1
    fc2 = experts.fc2_SDF.double() + SCALE * wide["fc2_b"] @ wide["fc2_a"]
    biases = (None if bias is None else bias.double() for bias in experts.parameters[2:])
    merged = ExpertWeights.of((fc1, fc2, *biases), slot_of_E=experts.slot_of_E)
    return expert_mlp(wide["x"], ids, wide["weights"], merged, "reference")


def gradients(y, leaves):
    generator = torch.Generator().manual_seed(6)
    like = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad((y * like).sum(), list(leaves.values()), allow_unused=True)


def assert_close(actual, expected, dtype, name):
    assert actual is not None and actual.shape == expected.shape, name
    difference = (actual.double() - expected).abs().max()
    assert difference <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("slot_of_E", SLOTS.values(), ids=SLOTS)
def test_values_and_gradients_are_those_of_the_merged_weights(dtype, slot_of_E):
    leaves, ids, experts = case(dtype, slot_of_E, empty=(3,))
    y = frozen_expert_mlp(leaves["x"], ids, leaves["weights"], here(experts), low_rank(leaves))
    expected = expected_of(leaves, ids, experts)
    assert y.dtype == dtype
    assert_close(y, expected.detach(), dtype, "y")
    found, wanted = gradients(y, leaves), gradients(expected, leaves)
    for name, actual, right in zip(leaves, found, wanted, strict=True):
        assert_close(actual, right.double(), dtype, name)
    unused = 3 if slot_of_E is None else slot_of_E[3]
    assert all(float(grad[unused].abs().max()) == 0 for grad in found[2:])


@pytest.mark.parametrize("slot_of_E", SLOTS.values(), ids=SLOTS)
def test_biases_are_added_to_both_products(slot_of_E):
    leaves, ids, experts = case(torch.float64, slot_of_E)
    g = torch.Generator().manual_seed(4)
    sizes = ((experts.num_slots, 2 * F), (experts.num_slots, D))
    fc1_bias, fc2_bias = (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)
    biased = replace(experts, fc1_bias_SH=fc1_bias, fc2_bias_SD=fc2_bias)
    right = expected_of(leaves, ids, biased)
    assert (right - expected_of(leaves, ids, experts)).abs().max() > 0.1
    actual = frozen_expert_mlp(leaves["x"], ids, leaves["weights"], here(biased), low_rank(leaves))
    torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)


def test_a_rank_without_rows_still_has_a_graph():
    leaves, ids, experts = case(torch.float32, None)
    update, empty = low_rank(leaves), torch.full_like(ids, -1)
    x, weights = leaves["x"].detach(), leaves["weights"].detach()
    y = frozen_expert_mlp(x, empty, weights, here(experts), update)
    assert float(y.detach().abs().max()) == 0
    y.sum().backward()
    assert float(leaves["fc2_b"].grad.abs().max()) == 0
    none = frozen_expert_mlp(x[:0], empty[:0], weights[:0], here(experts), update)
    assert none.shape == (0, D) and none.requires_grad
