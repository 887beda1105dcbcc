"""Frozen experts that come in waves: the same bits as in one piece, forward and backward.

T tokens, K choices, E experts, D model width, F expert width, P rank.
"""

import pytest
import torch

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.frozen_experts import frozen_expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.frozen import FrozenExperts
from moeyard.kernels.values.low_rank import LowRank
from moeyard.kernels.values.quantize import quantize
from moeyard.kernels.values.quantized_weights import QuantizedExpertWeights

T, K, E, D, F, P = 150, 3, 6, 64, 32, 4
TYPES = (torch.float32, torch.bfloat16)
SPLITS = ([[5], [0, 2], [4, 1], [3]], [[3, 2, 1, 0, 5], [4]])


def draw(generator, *shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def case(dtype):
    """Return what requires gradients, the ids, and the experts' matrices and biases."""
    g = torch.Generator().manual_seed(2)
    ids = torch.rand(T, E, generator=g).argsort(dim=1)[:, :K]
    ids[::7, 1] = -1
    leaves = [draw(g, T, D, dtype=dtype), torch.rand(T, K, generator=g)]
    for shape in ((E, 2 * P, D), (E, 2 * F, P), (E, P, F), (E, D, P)):
        leaves.append(draw(g, *shape, dtype=dtype, scale=shape[-1] ** -0.5))
    matrices = (draw(g, E, 2 * F, D, scale=0.2), draw(g, E, D, F, scale=0.2))
    biases = (draw(g, E, 2 * F), draw(g, E, D))
    return [leaf.requires_grad_() for leaf in leaves], ids, matrices, biases


def results(leaves, ids, experts, has_update=True, **options):
    """Return y and all gradients."""
    update = LowRank(*leaves[2:], 1.5) if has_update else None
    y = frozen_expert_mlp(leaves[0], ids, leaves[1], experts, update, **options)
    return gradients(y, leaves if has_update else leaves[:2])


def gradients(y, leaves):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def in_waves(split, weights_of):
    """Return experts that come as ``split`` says, in memory that is overwritten in between."""

    def stream(rows_of):
        for wave in split:
            ready = [expert for expert in wave if expert in rows_of]
            weights = weights_of(ready)
            yield ready, weights
            for part in (weights.fc1_SHD, weights.fc2_SDF):
                part.fill_(float("nan"))

    return FrozenExperts(stream, E, F, "swiglu")


def in_one(weights):
    """Return experts in one wave; A and B of expert e are in slot e."""
    return FrozenExperts(FrozenExperts.in_memory(weights).stream, E, F, "swiglu")


def plain(dtype, matrices, biases, ready=range(E)):
    """Return weights of ``ready`` in reverse order, in a larger memory."""
    slots = [-1] * E
    for slot, expert in enumerate(reversed(ready)):
        slots[expert] = slot + 1
    order = [0, *reversed(ready), 0]
    parts = [part[order].to(dtype) for part in (*matrices, *biases)]
    return ExpertWeights.of(parts, slot_of_E=tuple(slots))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("has_update", [True, False])
def test_waves_change_no_bit_of_values_and_gradients(dtype, recompute, has_update):
    leaves, ids, matrices, biases = case(dtype)
    wanted = results(leaves, ids, in_one(plain(dtype, matrices, biases)), has_update)
    for split in SPLITS:
        experts = in_waves(split, lambda ready: plain(dtype, matrices, biases, ready))
        found = results(leaves, ids, experts, has_update, recompute=recompute)
        for actual, right in zip(found, wanted, strict=True):
            assert torch.equal(actual, right) and bool(actual.any())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_without_updates_gradients_are_those_of_the_reference(dtype):
    leaves, ids, matrices, biases = case(dtype)
    weights = plain(dtype, matrices, biases)
    found = results(leaves, ids, FrozenExperts.in_memory(weights), has_update=False)
    wanted = gradients(expert_mlp(leaves[0], ids, leaves[1], weights, "reference"), leaves[:2])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for actual, right in zip(found, wanted, strict=True):
        assert (actual - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_quantized_experts_train_as_their_dequantized_matrices(bits, dtype):
    leaves, ids, matrices, biases = case(dtype)
    few = [quantize(matrix, bits, 32) for matrix in matrices]
    quantized = QuantizedExpertWeights(*few, fc1_bias_SH=biases[0], fc2_bias_SD=biases[1])
    wide = [torch.stack([m.dequantize(e, dtype) for e in range(E)]) for m in few]

    def stream(rows_of):
        for ready in SPLITS[0]:
            yield [expert for expert in ready if expert in rows_of], quantized

    wanted = results(leaves, ids, in_one(plain(dtype, wide, biases)))
    found = results(leaves, ids, FrozenExperts(stream, E, F, "swiglu"))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_recompute_keeps_no_pre_activations():
    leaves, ids, matrices, biases = case(torch.float32)
    experts = in_one(plain(torch.float32, matrices, biases))

    def kept(**options):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            update = LowRank(*leaves[2:], 1.5)
            frozen_expert_mlp(leaves[0], ids, leaves[1], experts, update, **options)
        return sum(t.numel() for t in found)

    rows = int((ids >= 0).sum())
    assert kept() - kept(recompute=True) == rows * 2 * F


def test_an_error_of_the_stream_ends_it_and_comes_out_of_backward_too():
    leaves, ids, matrices, biases = case(torch.float32)
    calls, closed = [], []

    def stream(rows_of):
        calls.append(dict(rows_of))
        try:
            yield list(rows_of), plain(torch.float32, matrices, biases)
            if len(calls) == 2:
                raise OSError("gone")
        finally:
            closed.append(len(calls))

    y = frozen_expert_mlp(leaves[0], ids, leaves[1], FrozenExperts(stream, E, F, "swiglu"))
    with pytest.raises(OSError, match="gone"):
        y.sum().backward()
    assert closed == [1, 2] and calls[0] == calls[1]
    assert sum(calls[0].values()) == int((ids >= 0).sum())
