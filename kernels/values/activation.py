"""Activations of the expert MLP, forward and backward: ``act(gate) * factor(up)`` or ``act(up)``.

N rows, F expert width, H columns of ``h``. With a gate H = 2F: the first F columns are the gate,
the others the up projection. Without a gate H = F, and ``h`` is the up projection.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["swiglu", "reglu", "geglu", "clamped_swiglu", "relu", "gelu"]
"""silu, relu or exact (erf) gelu of the gate, times up (Shazeer 2020, "GLU Variants"), or gpt-oss's
``g * sigmoid(1.702 g) * (u + 1)`` with gate and up clamped: ``g <= 7`` and ``-7 <= u <= 7``. The
last two, relu and exact gelu, have no gate."""

ACTIVATIONS: tuple[Activation, ...] = (
    "swiglu",
    "reglu",
    "geglu",
    "clamped_swiglu",
    "relu",
    "gelu",
)
UNGATED: tuple[Activation, ...] = ("relu", "gelu")
"""Those without a gate: two matrices an expert instead of three."""

CLAMP = 7.0
"""The limit of ``clamped_swiglu``, and below its slope: gpt-oss's constants."""
CLAMPED_SLOPE = 1.702


def fc1_parts(activation: str) -> tuple[str, ...]:
    """Return what the rows of an expert's first matrix are, F rows each, in order."""
    return ("up",) if activation in UNGATED else ("gate", "up")


def fc1_rows(d_expert: int, activation: str) -> int:
    """Return H, the rows of an expert's first matrix: 2F with a gate, F without one."""
    return len(fc1_parts(activation)) * d_expert


def gated(h_NH: Tensor, activation: Activation) -> Tensor:
    """Return ``act(gate) * factor(up)``, or ``act(up)`` without a gate: ``[N, F]``."""
    if activation in UNGATED:
        return _act(h_NH, activation)
    gate_NF, up_NF = h_NH.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate_NF = gate_NF.clamp(max=CLAMP)
        up_NF = up_NF.clamp(-CLAMP, CLAMP) + 1
        return gate_NF * torch.sigmoid(gate_NF * CLAMPED_SLOPE) * up_NF
    return _act(gate_NF, activation) * up_NF


def gated_backward(h_NH: Tensor, grad_NF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return :func:`gated` again and its gradient with respect to ``h``, ``[N, H]``."""
    if activation == "clamped_swiglu":
        return _clamped_backward(h_NH, grad_NF)
    grad_NH = torch.empty_like(h_NH)
    if activation in UNGATED:
        _act_backward(grad_NF, h_NH, activation, grad_NH)
        return _act(h_NH, activation), grad_NH
    gate_NF, up_NF = h_NH.chunk(2, dim=-1)
    grad_gate_NF, grad_up_NF = grad_NH.chunk(2, dim=-1)
    act_NF = _act(gate_NF, activation)
    torch.mul(grad_NF, act_NF, out=grad_up_NF)
    _act_backward(grad_NF * up_NF, gate_NF, activation, grad_gate_NF)
    return act_NF.mul_(up_NF), grad_NH


def _act(gate_NF: Tensor, activation: Activation) -> Tensor:
    if activation == "swiglu":
        return F.silu(gate_NF)
    return F.relu(gate_NF) if activation in ("reglu", "relu") else F.gelu(gate_NF)


def _act_backward(grad_NF: Tensor, gate_NF: Tensor, activation: Activation, out_NF: Tensor) -> None:
    """Write the gradient with torch's own backward, one pass that rounds once."""
    aten = torch.ops.aten
    if activation == "swiglu":
        aten.silu_backward.grad_input(grad_NF, gate_NF, grad_input=out_NF)
    elif activation in ("reglu", "relu"):
        aten.threshold_backward.grad_input(grad_NF, gate_NF, 0, grad_input=out_NF)
    else:
        aten.gelu_backward.grad_input(grad_NF, gate_NF, grad_input=out_NF)


def _clamped_backward(h_N2F: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Compute at least in fp32, and round the results only."""
    wide_N2F = h_N2F.to(torch.promote_types(h_N2F.dtype, torch.float32))
    gate_NF, up_NF = wide_N2F.chunk(2, dim=-1)
    clamped_NF, factor_NF = gate_NF.clamp(max=CLAMP), up_NF.clamp(-CLAMP, CLAMP) + 1
    sigmoid_NF = torch.sigmoid(clamped_NF * CLAMPED_SLOPE)
    act_NF = clamped_NF * sigmoid_NF
    slope_NF = sigmoid_NF + act_NF * CLAMPED_SLOPE * (1 - sigmoid_NF)
    grad_gate_NF = grad_NF * factor_NF * slope_NF * (gate_NF <= CLAMP)
    grad_up_NF = grad_NF * act_NF * (up_NF.abs() <= CLAMP)
    grad_N2F = torch.cat((grad_gate_NF, grad_up_NF), dim=-1).to(h_N2F.dtype)
    return (act_NF * factor_NF).to(h_N2F.dtype), grad_N2F
