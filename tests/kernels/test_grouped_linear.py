"""Rows times the matrix of their group: values and gradients of one product after the other.

N rows, S slots, P inputs, Q outputs.
"""

import pytest
import torch

from moeyard.kernels import grouped_linear as module
from moeyard.kernels.cpu.library import load
from moeyard.kernels.grouped_linear import grouped_linear
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
    x = torch.randn(N, 2 * inputs, generator=g).to(dtype)[:, inputs:].requires_grad_()
    weight = torch.randn(S, 2 * outputs, inputs, generator=g).to(dtype)[:, outputs:]
    weight.requires_grad_()
    upstream = torch.randn(N, outputs, generator=g).to(dtype)
    if backend == "cpp":
        assert module.can_multiply(x, weight)
    y = grouped_linear(x, weight, SPANS)
    found = (y, *torch.autograd.grad(y, (x, weight), upstream))
    wide_x, wide_weight = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
    parts = [wide_x[start:end] @ wide_weight[slot].t() for slot, start, end in SPANS]
    right = torch.cat(parts)
    expected = (right, *torch.autograd.grad(right, (wide_x, wide_weight), upstream.double()))
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == dtype and actual.shape == wanted.shape
        error = (actual.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[dtype]
    assert not found[2][[1, 3]].any(), "slots without rows have no gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_have_a_graph_and_no_gradient(backend, monkeypatch):
    if backend == "torch":
        monkeypatch.setattr(module, "can_multiply", lambda *_: False)
    weight = torch.randn(S, 4, 6, requires_grad=True)
    y = grouped_linear(torch.empty(0, 6), weight, [])
    y.sum().backward()
    assert y.shape == (0, 4) and not weight.grad.any()


def test_rows_are_kept_only_for_matrices_that_want_gradients():
    def is_kept(weight):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            grouped_linear(x, weight, [Span(0, 0, 8)])
        return any(t.data_ptr() == x.data_ptr() for t in kept)

    x, weight = torch.randn(8, 6, requires_grad=True), torch.randn(1, 4, 6)
    assert not is_kept(weight) and is_kept(weight.clone().requires_grad_())


@pytest.mark.parametrize("inputs", [5, 6])
def test_odd_widths_are_left_to_torch(inputs):
    x, weight = torch.randn(8, inputs), torch.randn(1, 4, inputs)
    if load().functions is not None:
        assert module.can_multiply(x, weight) == (inputs == 6)
    y = grouped_linear(x, weight, [Span(0, 0, 8)])
    torch.testing.assert_close(y, x @ weight[0].t())
