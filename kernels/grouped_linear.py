"""Rows times the matrix of their group, differentiable: on C++ kernels, or group by group.

N rows in expert order, n rows of one group (perhaps padded), S slots, P inputs, Q outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu.grouped import can_multiply, grad_rows, grad_weights, multiply
from .torch_ops.loop import Span, rounded
from .trust import may_use_cpp


def grouped_linear(x_NP: Tensor, weight_SQP: Tensor, spans: list[Span]) -> Tensor:
    """Return ``y_n = W_slot(n) x_n``, ``[N, Q]``, differentiable in both.

    The spans must cover all N rows. Sums have one order, without atomics. Rows are kept for
    backward only if the matrices require gradients.
    """
    y_NQ: Tensor = _GroupedLinear.apply(x_NP, weight_SQP, spans)
    return y_NQ


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NP, weight_SQP, spans):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_NP if ctx.needs_input_grad[1] else None, weight_SQP)
        ctx.spans = spans
        ctx.is_cpp = may_use_cpp(x_NP) and can_multiply(x_NP, weight_SQP)
        if ctx.is_cpp:
            return multiply(x_NP, weight_SQP, spans)
        return _each_group(x_NP, weight_SQP, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NQ):  # type: ignore[no-untyped-def]
        x_NP, weight_SQP = ctx.saved_tensors
        grad_NQ, spans = grad_NQ.contiguous(), ctx.spans
        grad_x_NP, grad_SQP = None, None
        if ctx.needs_input_grad[0]:
            product = grad_rows if ctx.is_cpp else _each_group_transposed
            grad_x_NP = product(grad_NQ, weight_SQP, spans)
        if ctx.needs_input_grad[1]:
            sums = grad_weights if ctx.is_cpp else _sum_each_group
            grad_SQP = sums(grad_NQ, x_NP, len(weight_SQP), spans)
        return grad_x_NP, grad_SQP, None


def _each_group_transposed(grad_NQ: Tensor, weight_SQP: Tensor, spans: list[Span]) -> Tensor:
    return _each_group(grad_NQ, weight_SQP.transpose(1, 2), spans)


def _each_group(x_NP: Tensor, weight_SQP: Tensor, spans: list[Span]) -> Tensor:
    y_NQ = x_NP.new_empty(len(x_NP), weight_SQP.shape[1])
    for slot, start, end in spans:
        y_NQ[start:end] = F.linear(_some(x_NP, start, end), weight_SQP[slot])[: end - start]
    return y_NQ


def _sum_each_group(grad_NQ: Tensor, x_NP: Tensor, num_slots: int, spans: list[Span]) -> Tensor:
    grad_SQP = x_NP.new_zeros(num_slots, grad_NQ.shape[1], x_NP.shape[1])
    for slot, start, end in spans:
        torch.mm(_some(grad_NQ, start, end).t(), _some(x_NP, start, end), out=grad_SQP[slot])
    return grad_SQP


def _some(x_NP: Tensor, start: int, end: int) -> Tensor:
    """Return a group's rows, padded with zeros to one of few sizes (kernels/torch_ops/loop.py)."""
    return F.pad(x_NP[start:end], (0, 0, 0, rounded(end - start, x_NP) - (end - start)))
