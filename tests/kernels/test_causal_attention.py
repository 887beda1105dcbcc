"""Blocked causal attention equals F.scaled_dot_product_attention, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from moeyard.kernels.torch_ops.causal_attention import LENGTHS, CausalAttention, can_run

SHAPES = {
    "one_block": (3, 64, 4, 2, 16),
    "ends_inside_a_block": (2, 201, 6, 3, 24),
    "one_token": (2, 1, 2, 2, 8),
    "one_head_for_all": (1, 130, 4, 1, 32),
    "a_head_each": (2, 129, 3, 3, 10),
}
"""B, L, query heads, key/value heads, head width."""


def leaves(shape, dtype):
    num_sequences, length, num_heads, num_groups, width = shape
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(num_sequences, length, heads, width, dtype=torch.float64, generator=generator)
        .to(dtype)
        .requires_grad_()
        for heads in (num_heads, num_groups, num_groups)
    ]


def sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def values_and_gradients(function, inputs):
    out = function(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_sdpa_in_fp64(shape):
    inputs = leaves(shape, torch.float64)
    found = values_and_gradients(CausalAttention.apply, inputs)
    expected = values_and_gradients(sdpa, inputs)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_is_about_as_near_to_fp64_as_sdpa_of_the_same_type(shape, dtype):
    inputs = leaves(shape, dtype)
    exact = values_and_gradients(sdpa, [t.detach().double().requires_grad_() for t in inputs])
    found = values_and_gradients(CausalAttention.apply, inputs)
    theirs = values_and_gradients(sdpa, inputs)
    for actual, other, wanted in zip(found, theirs, exact, strict=True):
        error, their_error = ((t.double() - wanted).norm() for t in (actual, other))
        rounding = torch.finfo(dtype).eps * wanted.norm()
        assert error <= 2 * their_error + rounding, f"{float(error)}, sdpa {float(their_error)}"


def test_a_token_does_not_feel_those_after_it():
    q, k, v = leaves((1, 150, 2, 1, 8), torch.float32)
    changed = [t.detach().clone() for t in (q, k, v)]
    for tensor in changed:
        tensor[:, 70:] += 1
    before, after = CausalAttention.apply(q, k, v), CausalAttention.apply(*changed)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


def test_runs_in_training_for_sequences_that_are_neither_short_nor_long():
    q = torch.zeros(1, LENGTHS.stop, 1, 1)
    assert can_run(q[:, : LENGTHS.start]) and can_run(q[:, :-1])
    assert not can_run(q) and not can_run(q[:, : LENGTHS.start - 1])
    with torch.no_grad():
        assert not can_run(q[:, : LENGTHS.start])
