"""Rows times the matrix of their group: values and gradients of one product after the other.

N rows, S slots, P inputs, Q outputs.
"""

import pytest
import torch

from moeyard.kernels import grouped_linear as module
from moeyard.kernels.cpu.library import load
from moeyard.kernels.grouped_linear import grouped_linear, grouped_sums, grouped_transposed
from moeyard.kernels.torch_ops.loop import Span

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
"""Largest difference over the largest value; bf16 results are rounded once, by 2^-8 at most."""
SPANS = [Span(2, 0, 700), Span(0, 700, 701), Span(4, 701, 950)]
"""More rows than a panel is deep, a single row, more than meet one packed panel; two idle slots."""
S, N = 5, 950
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(load().functions is None, reason=load().state)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(70, 130), (6, 2), (2, 66)])
def test_values_and_gradients_are_those_of_each_product(
    backend, dtype, inputs, outputs, monkeypatch
):
    if backend == "torch":
        monkeypatch.setattr(module, "can_multiply", lambda *_: False)
    g = torch.Generator().manual_seed(0)
    # Every second half of a wider matrix, as rows of A come, and every slot of a longer one.
    x = torch.randn(N, 2 * inputs, generator=g).to(dtype)[:, inputs:]
    weight = torch.randn(S, 2 * outputs, inputs, generator=g).to(dtype)[:, outputs:]
    upstream = torch.randn(N, outputs, generator=g).to(dtype)
    if backend == "cpp":
        assert module.can_multiply(x, weight)
    y = grouped_linear(x, weight, SPANS)
    grad_x = grouped_transposed(upstream, weight, SPANS)
    found = (y, grad_x, grouped_sums(upstream, x, S, SPANS))
    wide_x, wide_weight = (leaf.double().requires_grad_() for leaf in (x, weight))
    parts = [wide_x[start:end] @ wide_weight[slot].t() for slot, start, end in SPANS]
    right = torch.cat(parts)
    expected = (right, *torch.autograd.grad(right, (wide_x, wide_weight), upstream.double()))
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == dtype and actual.shape == wanted.shape
        error = (actual.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[dtype]
    assert not found[2][[1, 3]].any(), "slots without rows have no gradient"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_group_has_the_same_bits_alone_and_leaves_other_rows_alone(backend, dtype, monkeypatch):
    if backend == "torch":
        monkeypatch.setattr(module, "can_multiply", lambda *_: False)
    g = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(N, width, generator=g).to(dtype) for width in (66, 34))
    weight = torch.randn(S, 34, 66, generator=g).to(dtype)
    whole = (grouped_linear(x, weight, SPANS), grouped_transposed(upstream, weight, SPANS))
    parts = [torch.full_like(rows, 7) for rows in whole]
    for slot, start, end in reversed(SPANS):
        alone = weight[slot].clone().unsqueeze(0)
        before = [part[:start].clone() for part in parts]
        grouped_linear(x, alone, [Span(0, start, end)], parts[0])
        grouped_transposed(upstream, alone, [Span(0, start, end)], parts[1])
        assert all(torch.equal(p[:start], b) for p, b in zip(parts, before, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(parts, whole, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_have_no_gradient(backend, monkeypatch):
    if backend == "torch":
        monkeypatch.setattr(module, "can_multiply", lambda *_: False)
    empty = torch.empty(0, 6)
    assert grouped_linear(empty, torch.randn(S, 4, 6), []).shape == (0, 4)
    assert not grouped_sums(torch.empty(0, 4), empty, S, []).any()


@pytest.mark.parametrize("inputs", [5, 6])
def test_odd_widths_are_left_to_torch(inputs):
    x, weight = torch.randn(8, inputs), torch.randn(1, 4, inputs)
    if load().functions is not None:
        assert module.can_multiply(x, weight) == (inputs == 6)
    y = grouped_linear(x, weight, [Span(0, 0, 8)])
    torch.testing.assert_close(y, x @ weight[0].t())
