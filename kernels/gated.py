"""The elementwise parts of MLPs that are not experts: on the C++ kernels, or on torch.

Torch computes the last numbers of a piece of memory with other instructions than the rest, and
threads cut pieces anywhere. So there the last bits of a row may depend on the number of rows.

N rows, F inner width, H columns before the activation: 2F with a gate, F without.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu.gated import gated as cpp_gated
from .trust import may_use_cpp
from .values.activation import Activation
from .values.activation import gated as torch_gated

VECTOR = 64
"""A multiple of the numbers that torch computes at once, in every type."""
FOR_ONE_THREAD = 1 << 14
"""Numbers that torch does not share between threads."""


def gated(h_NH: Tensor, activation: Activation) -> Tensor:
    """Return ``act(gate) * factor(up)`` of rows ``[gate, up]``, or ``act(up)``: ``[N, F]``."""
    if not torch.is_grad_enabled() and may_use_cpp(h_NH):
        found = cpp_gated(h_NH, activation)
        if found is not None:
            return found
    return torch_gated(h_NH, activation)


def row_sigmoid(x_N1: Tensor) -> Tensor:
    """Return the sigmoid of a number per row; on the CPU without gradients, rows are independent.

    Each number is filled up to a whole vector.
    """
    if torch.is_grad_enabled() or not x_N1.is_cpu:
        return x_N1.sigmoid()
    pieces = x_N1.split(FOR_ONE_THREAD // VECTOR)
    return torch.cat([F.pad(part, (0, VECTOR - 1)).sigmoid()[:, :1] for part in pieces])
