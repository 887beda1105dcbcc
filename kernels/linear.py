"""A linear layer's product: on the C++ kernels, or on torch in blocks of rows.

N rows, P inputs, Q outputs.
"""

import torch
from torch import Tensor

from .cpu.linear import linear as cpp_linear
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
