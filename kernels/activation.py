"""Gated activations of the expert MLP, forward and backward: ``act(gate) * up``.

N rows, F expert width. The first F columns of ``h`` are the gate, the others the up projection.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["swiglu", "reglu", "geglu"]
"""silu, relu or exact (erf) gelu of the gate, times up (Shazeer 2020, "GLU Variants")."""

ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "reglu", "geglu")


def gated(h_N2F: Tensor, activation: Activation) -> Tensor:
    """Return ``act(gate) * up``, ``[N, F]``."""
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    return _act(gate_NF, activation) * up_NF


def gated_backward(h_N2F: Tensor, grad_NF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return :func:`gated` again and its gradient with respect to ``h``, ``[N, 2F]``."""
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    grad_N2F = torch.empty_like(h_N2F)
    grad_gate_NF, grad_up_NF = grad_N2F.chunk(2, dim=-1)
    act_NF = _act(gate_NF, activation)
    torch.mul(grad_NF, act_NF, out=grad_up_NF)
    _act_backward(grad_NF * up_NF, gate_NF, activation, grad_gate_NF)
    return act_NF.mul_(up_NF), grad_N2F


def _act(gate_NF: Tensor, activation: Activation) -> Tensor:
    if activation == "swiglu":
        return F.silu(gate_NF)
    return F.relu(gate_NF) if activation == "reglu" else F.gelu(gate_NF)


def _act_backward(grad_NF: Tensor, gate_NF: Tensor, activation: Activation, out_NF: Tensor) -> None:
    """Write the gradient with torch's own backward, one pass that rounds once."""
    aten = torch.ops.aten
    if activation == "swiglu":
        aten.silu_backward.grad_input(grad_NF, gate_NF, grad_input=out_NF)
    elif activation == "reglu":
        aten.threshold_backward.grad_input(grad_NF, gate_NF, 0, grad_input=out_NF)
    else:
        aten.gelu_backward.grad_input(grad_NF, gate_NF, grad_input=out_NF)
