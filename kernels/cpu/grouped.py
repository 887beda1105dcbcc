"""Rows times the matrix of their slot, and the gradients, on the C++ kernels.

N rows sorted by slot, S slots, P inputs, Q outputs.
"""

import ctypes
from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from .library import TYPES, functions_for
from .structures import GroupedArguments


def can_multiply(x_NP: Tensor, weight_SQP: Tensor) -> bool:
    """Say whether the kernels support these tensors."""
    num_outputs, num_inputs = weight_SQP.shape[1:]
    has_pairs = num_outputs % 2 == 0 and num_inputs % 2 == 0  # bf16 is multiplied in pairs
    are_dense = x_NP.stride(1) == 1 and weight_SQP.stride()[1:] == (num_inputs, 1)
    if not has_pairs or not are_dense or x_NP.dtype != weight_SQP.dtype:
        return False
    return functions_for(x_NP[:0], weight_SQP[:0], is_backward_ours=True) is not None


def multiply(
    x_NP: Tensor, weight_SQP: Tensor, spans: Iterable[tuple[int, int, int]], out_NQ: Tensor
) -> None:
    """Write ``x_n W_slot(n)^T`` to the rows of the spans, which are slot, first row and end."""
    _run("product", x_NP, out_NQ, weight_SQP, spans)


def grad_rows(
    grad_NQ: Tensor, weight_SQP: Tensor, spans: Iterable[tuple[int, int, int]], out_NP: Tensor
) -> None:
    """Write ``grad_n W_slot(n)`` to the rows of the spans."""
    _run("product_grad", out_NP, grad_NQ, weight_SQP, spans)


def grad_weights(
    grad_NQ: Tensor, x_NP: Tensor, num_slots: int, spans: Iterable[tuple[int, int, int]]
) -> Tensor:
    """Return each slot's ``grad^T x``, ``[S, Q, P]``; 0 without rows."""
    grad_SQP = x_NP.new_empty(num_slots, grad_NQ.shape[1], x_NP.shape[1])
    _run("weight_grad", x_NP, grad_NQ, grad_SQP, spans)
    return grad_SQP


def _run(
    name: str,
    x_NP: Tensor,
    y_NQ: Tensor,
    weight_SQP: Tensor,
    spans: Iterable[tuple[int, int, int]],
) -> None:
    num_slots, num_outputs, num_inputs = weight_SQP.shape
    bounds = array("q", bytes(16 * num_slots))
    for slot, start, end in spans:
        bounds[2 * slot], bounds[2 * slot + 1] = start, end
    arguments = GroupedArguments(
        type=TYPES[x_NP.dtype],
        num_slots=num_slots,
        inputs=num_inputs,
        outputs=num_outputs,
        threads=torch.get_num_threads(),
        weight_stride=weight_SQP.stride(0),
        x_stride=x_NP.stride(0),
        y_stride=y_NQ.stride(0),
        spans=bounds.buffer_info()[0],
        x=x_NP.data_ptr(),
        y=y_NQ.data_ptr(),
        weights=weight_SQP.data_ptr(),
    )
    functions = functions_for(x_NP[:0], is_backward_ours=True)
    assert functions is not None, "can_multiply was not asked"
    getattr(functions, f"moeyard_grouped_{name}")(ctypes.byref(arguments))
