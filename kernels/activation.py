"""Gated activations of the expert MLP, forward and backward.

N rows, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(h_N2F: Tensor) -> Tensor:
    """Return silu(gate) * up, ``[N, F]``; the first F columns of ``h`` are the gate."""
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def swiglu_backward(h_N2F: Tensor, grad_NF: Tensor) -> Tensor:
    """Return the gradient of :func:`swiglu` with respect to ``h``, ``[N, 2F]``."""
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    sigmoid_NF = torch.sigmoid(gate_NF)
    silu_NF = gate_NF * sigmoid_NF
    grad_N2F = torch.empty_like(h_N2F)
    grad_gate_NF, grad_up_NF = grad_N2F.chunk(2, dim=-1)
    torch.mul(grad_NF, silu_NF, out=grad_up_NF)
    # d silu(g) / d g = sigmoid + silu * (1 - sigmoid)
    slope_NF = torch.addcmul(sigmoid_NF, silu_NF, 1 - sigmoid_NF)
    torch.mul(grad_NF * up_NF, slope_NF, out=grad_gate_NF)
    return grad_N2F
