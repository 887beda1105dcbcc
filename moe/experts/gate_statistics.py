"""Mean and variance of the rows that go through each expert's activation, with gradient.

These are the gate rows, or all rows of fc1 where experts have no gate.

S expert slots, F expert width, H rows of fc1 (the first F are those), D model width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels.values.main_grads import MainGrads


def gate_statistics(
    fc1_SHD: Tensor, fc1_bias_SH: Tensor | None, main_grads: MainGrads | None, width: int
) -> Tensor:
    """Return mean and variance of the first ``width`` = F rows of ``fc1``, ``[S, 2, D]``.

    In fp32, or in fp64 for fp64 weights. The variance is that of all F rows (divided by F). With a
    bias the last dimension has one more element: the bias is the weight of an input that is always
    1. ``main_grads`` take the gradient of fc1, if given; otherwise autograd does.
    """
    found: Tensor = _MeanAndVariance.apply(fc1_SHD, main_grads, width)
    if fc1_bias_SH is None:
        return found
    of_bias = _MeanAndVariance.apply(fc1_bias_SH.unsqueeze(-1), None, width)
    return torch.cat([found, of_bias], dim=-1)


class _MeanAndVariance(torch.autograd.Function):
    """Keeps only the weights for backward. Plain autograd would keep a wide copy of bf16 ones."""

    @staticmethod
    def forward(ctx: Any, rows_SHD: Tensor, main_grads: MainGrads | None, width: int) -> Tensor:
        parts = []
        for gate_SFD in _gates(rows_SHD, width):
            mean_SD = gate_SFD.mean(dim=1)
            variance_SD = (gate_SFD - mean_SD.unsqueeze(1)).square_().mean(dim=1)
            parts.append(torch.stack([mean_SD, variance_SD], dim=1))
        found_S2D = torch.cat(parts)
        ctx.save_for_backward(rows_SHD, found_S2D[:, 0])
        ctx.main_grads, ctx.width = main_grads, width
        return found_S2D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S2D: Tensor) -> tuple[Tensor | None, None, None]:
        rows_SHD, mean_SD = ctx.saved_tensors
        width: int = ctx.width
        main: MainGrads | None = ctx.main_grads
        if main is not None and main.fc1_SHD is not None:
            main.begin_with_zeros()
            total_SHD, returned = main.fc1_SHD, None
        else:
            total_SHD = returned = torch.zeros_like(rows_SHD)
        grad_mean_SD, grad_variance_SD = (grad_S2D / width).unbind(dim=1)
        factor_S1D = (2 * grad_variance_SD).unsqueeze(1)
        shift_S1D = (grad_mean_SD - 2 * grad_variance_SD * mean_SD).unsqueeze(1)
        first = 0
        for gate_SFD in _gates(rows_SHD, width):
            here = slice(first, first + len(gate_SFD))
            grad_SFD = torch.addcmul(shift_S1D[here], factor_S1D[here], gate_SFD)
            total_SHD[here, :width].add_(grad_SFD)
            first = here.stop
        return returned, None, None


def _gates(rows_SHD: Tensor, width: int) -> list[Tensor]:
    """Return the first ``width`` rows in fp32 or fp64, in parts of some slots.

    On a CPU one expert after the other: its rows stay in the cache (16 experts of 512 x 1024 take
    14 ms instead of 23; ``torch.var_mean`` over this dimension takes 95).
    """
    dtype = torch.promote_types(rows_SHD.dtype, torch.float32)
    gate_SFD = rows_SHD[:, :width]
    size = 1 if rows_SHD.device.type == "cpu" else max(1, len(rows_SHD))
    return [part.to(dtype) for part in gate_SFD.split(size)]
