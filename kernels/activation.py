"""Gated activations of the expert MLP, forward and backward: ``act(gate) * up``.

N rows, F expert width. The first F columns of ``h`` are the gate, the others the up projection.
"""

import math
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
    if activation == "swiglu":
        return F.silu(gate_NF) * up_NF
    if activation == "reglu":
        return F.relu(gate_NF) * up_NF
    return F.gelu(gate_NF) * up_NF


def gated_backward(h_N2F: Tensor, grad_NF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return :func:`gated` again and its gradient with respect to ``h``, ``[N, 2F]``."""
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    act_NF, slope_NF = _value_and_slope(gate_NF, activation)
    grad_N2F = torch.empty_like(h_N2F)
    grad_gate_NF, grad_up_NF = grad_N2F.chunk(2, dim=-1)
    torch.mul(grad_NF, act_NF, out=grad_up_NF)
    torch.mul(grad_NF, slope_NF.mul_(up_NF), out=grad_gate_NF)
    return act_NF.mul_(up_NF), grad_N2F


def _value_and_slope(gate_NF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    if activation == "swiglu":
        sigmoid_NF = torch.sigmoid(gate_NF)
        silu_NF = gate_NF * sigmoid_NF
        # d silu(g) / d g = sigmoid + silu * (1 - sigmoid)
        return silu_NF, torch.addcmul(sigmoid_NF, silu_NF, 1 - sigmoid_NF)
    if activation == "reglu":
        return F.relu(gate_NF), (gate_NF > 0).to(gate_NF.dtype)
    # d gelu(g) / d g = Phi(g) + g * phi(g), Phi and phi the normal distribution and its density
    below_NF = 0.5 * (1 + torch.erf(gate_NF * math.sqrt(0.5)))
    density_NF = torch.exp(-0.5 * gate_NF.square()) / math.sqrt(2 * math.pi)
    return gate_NF * below_NF, torch.addcmul(below_NF, gate_NF, density_NF)
