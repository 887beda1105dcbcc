"""A linear layer's product: on the C++ kernels, or on torch in blocks of rows.

N rows, P inputs, Q outputs, E groups.
"""

import torch
from torch import Tensor

from .cpu.grouped import can_multiply, multiply
from .cpu.linear import linear as cpp_linear
from .torch_ops.loop import Span
from .torch_ops.row_stable import bf16_row_stable_linear
from .torch_ops.row_stable import row_stable_linear as row_stable_linear
from .trust import may_use_cpp


def linear(x_NP: Tensor, weight_QP: Tensor) -> Tensor:
    """Return ``x @ weight.T``; in bf16 without gradients, rows do not depend on the batch size."""
    if not torch.is_grad_enabled() and may_use_cpp(x_NP):
        # A part of wider rows is contiguous if it is one row alone, which must not matter.
        y_NQ = cpp_linear(x_NP.contiguous(), weight_QP)
        if y_NQ is not None:
            return y_NQ
    return bf16_row_stable_linear(x_NP, weight_QP)


def linear_by_group(x_NP: Tensor, weight_EQP: Tensor, groups: list[Span]) -> Tensor:
    """Return each row's product with the matrix of its group, ``[N, Q]``, for inference.

    The groups, in order, hold all rows. On the CPU a row's bits do not depend on the other rows.
    """
    if not groups:
        return x_NP.new_empty(0, weight_EQP.shape[1])
    if may_use_cpp(x_NP) and can_multiply(x_NP, weight_EQP):
        y_NQ = x_NP.new_empty(len(x_NP), weight_EQP.shape[1])
        multiply(x_NP, weight_EQP, groups, y_NQ)
        return y_NQ
    parts = [linear(x_NP[start:end], weight_EQP[group]) for group, start, end in groups]
    return torch.cat(parts)
