"""Rows times the matrix of their group, and its gradients: on C++ kernels, or group by group.

N rows in expert order, n rows of one group (perhaps padded), S slots, P inputs, Q outputs. Sums
have one order, without atomics. A group's bits depend on its rows and its matrix alone, so they are
the same whatever other groups are in the call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import grouped as cpp
from .cpu.grouped import can_multiply
from .torch_ops.loop import Span as Span
from .torch_ops.loop import rounded
from .trust import may_use_cpp


def grouped_linear(
    x_NP: Tensor, weight_SQP: Tensor, spans: list[Span], out_NQ: Tensor | None = None
) -> Tensor:
    """Return ``y_n = W_slot(n) x_n``, ``[N, Q]``. Rows outside the spans are left as they are."""
    if out_NQ is None:
        out_NQ = x_NP.new_empty(len(x_NP), weight_SQP.shape[1])
    if _is_cpp(x_NP, weight_SQP):
        cpp.multiply(x_NP, weight_SQP, spans, out_NQ)
    else:
        _each_group(x_NP, weight_SQP, spans, out_NQ)
    return out_NQ


def grouped_transposed(
    grad_NQ: Tensor, weight_SQP: Tensor, spans: list[Span], out_NP: Tensor | None = None
) -> Tensor:
    """Return ``W_slot(n)^T grad_n``, ``[N, P]``: the gradient of x. Else as above."""
    if out_NP is None:
        out_NP = grad_NQ.new_empty(len(grad_NQ), weight_SQP.shape[2])
    if _is_cpp(grad_NQ, weight_SQP):
        cpp.grad_rows(grad_NQ, weight_SQP, spans, out_NP)
    else:
        _each_group(grad_NQ, weight_SQP.transpose(1, 2), spans, out_NP)
    return out_NP


def grouped_sums(grad_NQ: Tensor, x_NP: Tensor, num_slots: int, spans: list[Span]) -> Tensor:
    """Return each slot's ``grad^T x``, ``[S, Q, P]``: the gradient of W, 0 without rows."""
    like_1QP = x_NP.new_empty(1, grad_NQ.shape[1], x_NP.shape[1])
    if _is_cpp(x_NP, like_1QP) and grad_NQ.stride(1) == 1:
        return cpp.grad_weights(grad_NQ, x_NP, num_slots, spans)
    grad_SQP = x_NP.new_zeros(num_slots, grad_NQ.shape[1], x_NP.shape[1])
    for slot, start, end in spans:
        torch.mm(_some(grad_NQ, start, end).t(), _some(x_NP, start, end), out=grad_SQP[slot])
    return grad_SQP


def _is_cpp(x_NP: Tensor, weight_SQP: Tensor) -> bool:
    return may_use_cpp(x_NP) and can_multiply(x_NP, weight_SQP)


def _each_group(x_NP: Tensor, weight_SQP: Tensor, spans: list[Span], out_NQ: Tensor) -> None:
    for slot, start, end in spans:
        out_NQ[start:end] = F.linear(_some(x_NP, start, end), weight_SQP[slot])[: end - start]


def _some(x_NP: Tensor, start: int, end: int) -> Tensor:
    """Return a group's rows, padded with zeros to one of few sizes (kernels/torch_ops/loop.py)."""
    return F.pad(x_NP[start:end], (0, 0, 0, rounded(end - start, x_NP) - (end - start)))
