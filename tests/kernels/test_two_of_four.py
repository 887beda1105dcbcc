"""2:4 experts in bf16: packed exactly, and computed with the bits of the plain weights."""

import functools

import pytest
import torch

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.n_of_m import keep_mask, masked
from moeyard.kernels.values.two_of_four import (
    PATTERN,
    TwoOfFourExpertWeights,
    TwoOfFourMatrices,
    check_places,
    pack,
    pack_experts,
    unpacked,
)
from moeyard.kernels.waves import start_waves

BACKENDS = pytest.mark.parametrize("backend", ["torch", "auto"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pruned(weight):
    return masked(weight, keep_mask(weight, PATTERN))


def test_packed_weights_come_back_exactly_in_few_bytes():
    weight = pruned(random(24, 200)).bfloat16()
    weight[3] = 0
    weight[4, 8:16] = torch.tensor([0, 0, 0, 5, 7, 0, 0, 0])
    view = pack(weight)
    assert torch.equal(unpacked(view, torch.bfloat16), weight)
    assert torch.equal(unpacked(view, torch.float64), weight.double())
    assert sum(part.nbytes for part in view) == 0.5625 * weight.nbytes
    check_places(view.places_QB)


def test_places_are_two_bits_each():
    """Quads (w0, w3), (w1, w2), nothing, (w2, w3): 0 + 4 * 3, 1 + 4 * 2, 0 + 4 * 1, 2 + 4 * 3."""
    row = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0, 0, 0, 0, 0, 0, 0, 5, 6]])
    view = pack(row)
    assert view.values_QV.tolist() == [[1, 2, 3, 4, 0, 0, 5, 6]]
    assert view.places_QB.tolist() == [[12 + 16 * 9, 4 + 16 * 14]]


def test_what_is_not_two_of_four_is_refused():
    weight = pruned(random(8, 32))
    weight[5, 12:16] = torch.tensor([1.0, 0, 2, 3])
    with pytest.raises(ValueError, match="more than 2 weights in inputs 12 to 15 of row 5"):
        pack(weight)
    with pytest.raises(ValueError, match="has 12 inputs, which must be a multiple of 8"):
        pack(torch.zeros(4, 12))


@pytest.mark.parametrize("places", [0b0000_0100, 0b0101_0100, 0b0100_0001, 0b0100_1111])
def test_places_that_name_no_two_inputs_are_refused(places):
    with pytest.raises(ValueError, match="do not name two inputs of each four"):
        check_places(torch.tensor([[0b1110_0100, places]], dtype=torch.uint8))


def test_parts_that_do_not_belong_together_are_refused():
    values, places = pack_experts(plain_experts()).fc1.tensors
    with pytest.raises(ValueError, match="they must be bfloat16 and uint8"):
        TwoOfFourMatrices(values.float(), places)
    with pytest.raises(ValueError, match="do not fit"):
        TwoOfFourMatrices(values[:, :, :-1], places)


@functools.cache
def plain_experts(d_model=96, d_expert=40, bias=False, activation="swiglu", experts=5):
    """Pruned experts in bf16; widths that are whole chunks and that are not."""
    fc1 = pruned(random(experts, 2 * d_expert, d_model, seed=2) * d_model**-0.5).bfloat16()
    fc2 = pruned(random(experts, d_model, d_expert, seed=3) * d_expert**-0.5).bfloat16()
    shapes = ((experts, 2 * d_expert), (experts, d_model))
    biases = [random(*shape, seed=4).bfloat16() if bias else None for shape in shapes]
    return ExpertWeights.of((fc1, fc2, *biases), activation=activation)


def rows_for(found, tokens):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, found.num_experts, (tokens, 2), generator=g)
    return random(tokens, found.d_model), ids, torch.rand(tokens, 2, generator=g)


def in_type(experts, dtype):
    parts = (None if part is None else part.to(dtype) for part in experts.parameters)
    return ExpertWeights.of(tuple(parts), activation=experts.activation)


@pytest.mark.usefixtures("instruction_set", "no_gradients")
@pytest.mark.parametrize("sizes", [(96, 40), (64, 64), (200, 8)], ids=str)
@DTYPES
def test_on_every_instruction_set_results_have_the_bits_of_plain_weights(dtype, sizes):
    plain = in_type(plain_experts(*sizes, bias=True), dtype)
    packed = pack_experts(plain)
    for tokens in (1, 2, 3, 5, 9, 40, 230):
        x, ids, weights = rows_for(plain, tokens)
        expected = expert_mlp(x.to(dtype), ids, weights, plain, "cpp")
        found = expert_mlp(x.to(dtype), ids, weights, packed, "cpp")
        assert torch.equal(found, expected), tokens
        assert tokens < 5 or found.abs().max() > 0.1


@BACKENDS
@pytest.mark.parametrize("activation", ["swiglu", "reglu", "geglu", "clamped_swiglu"])
@DTYPES
def test_experts_compute_with_the_weights_they_stand_for(dtype, activation, backend):
    plain = plain_experts(activation=activation)
    packed = pack_experts(plain)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for tokens in (1, 6, 130):
        x, ids, weights = rows_for(plain, tokens)
        x = x.to(dtype)
        wide = in_type(plain, torch.float64)
        expected = expert_mlp(x.double(), ids, weights.double(), wide, "reference")
        y = expert_mlp(x, ids, weights, packed, backend)
        assert (y.double() - expected).abs().max() <= limit * expected.abs().max()


@BACKENDS
def test_slots_and_waves_do_not_change_the_bits(backend):
    packed = pack_experts(plain_experts())
    x, ids, weights = rows_for(packed, 9)
    x, ids = x.bfloat16(), ids.clamp(min=2)
    expected = expert_mlp(x, ids, weights, packed, backend)
    parts = [
        TwoOfFourMatrices(*(t[[4, 2, 3]].clone() for t in m.tensors))
        for m in (packed.fc1, packed.fc2)
    ]
    moved = TwoOfFourExpertWeights(*parts, slot_of_E=(-1, -1, 1, 2, 0))
    assert torch.equal(expert_mlp(x, ids, weights, moved, backend), expected)
    with torch.no_grad():
        waves = start_waves(x, ids, weights, 5)
        for only in ([3], [4, 2]):
            waves.add(moved, only)
        if backend == "auto":
            assert torch.equal(waves.result(), expected)


def test_gradients_and_backends_without_a_kernel_are_refused():
    packed = pack_experts(plain_experts())
    x, ids, weights = rows_for(packed, 3)
    with pytest.raises(ValueError, match="no backward"):
        expert_mlp(x.requires_grad_(), ids, weights, packed)
    with pytest.raises(ValueError, match="backend is 'triton'"):
        expert_mlp(x.detach(), ids, weights, packed, "triton")
