"""Linear layers: their bias, and rows that do not depend on the others."""

import pytest
import torch

from moeyard.kernels.cpu import library
from moeyard.moe.linear import Linear

KERNELS = [library.load(), library.Library(None, "left out")]


def layer(width: int, outputs: int = 37, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    linear = Linear(width, outputs, bias)
    if bias:
        torch.nn.init.normal_(linear.bias)
    return linear


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 37), (2048, 1024)], ids=str)
@pytest.mark.parametrize("kernels", KERNELS, ids=["cpp", "torch"])
def test_a_bf16_row_with_a_bias_has_the_same_bits_alone_and_among_others(
    size, kernels, monkeypatch
):
    """At the larger size, a single row's product has different bits in oneDNN."""
    monkeypatch.setattr(library, "_loaded", kernels)
    linear = layer(*size).bfloat16()
    x = torch.randn(200, size[0], generator=torch.Generator().manual_seed(1)).bfloat16()
    together = linear(x)
    for row in range(len(x)):
        assert torch.equal(linear(x[row : row + 1]), together[row : row + 1])
    assert torch.equal(linear(x[:5]), together[:5])
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(together.double(), exact, rtol=1e-2, atol=1e-2)


def test_values_and_gradients_are_those_of_the_formula():
    linear = layer(24).double()
    x = torch.randn(9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slope = torch.linspace(-1, 2, 9 * 37, dtype=torch.float64).view(9, 37)
    y = linear(x)
    torch.testing.assert_close(y, torch.einsum("tp,qp->tq", x, linear.weight) + linear.bias)
    y.backward(slope)
    torch.testing.assert_close(linear.bias.grad, slope.sum(0))
    torch.testing.assert_close(linear.weight.grad, torch.einsum("tq,tp->qp", slope, x))


def test_has_no_bias_unless_asked():
    assert layer(24, bias=False).bias is None and Linear(3, 4).bias is None
