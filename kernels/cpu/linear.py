"""A linear layer whose rows never depend on one another. N rows, P inputs, Q outputs."""

import ctypes

import torch
from torch import Tensor

from .library import TYPES, functions_for
from .structures import LinearArguments


def linear(x_NP: Tensor, weight_QP: Tensor) -> Tensor | None:
    """Return ``x @ weight.T``, ``[N, Q]``, or None if the kernels cannot run."""
    functions = functions_for(x_NP, weight_QP)
    if functions is None or x_NP.ndim != 2 or x_NP.shape[1] != weight_QP.shape[1]:
        return None
    (num_rows, width), num_outputs = x_NP.shape, weight_QP.shape[0]
    y_NQ = x_NP.new_empty(num_rows, num_outputs)
    arguments = LinearArguments(
        type=TYPES[x_NP.dtype],
        rows=num_rows,
        width=width,
        outputs=num_outputs,
        threads=torch.get_num_threads(),
        x=x_NP.data_ptr(),
        weight=weight_QP.data_ptr(),
        y=y_NQ.data_ptr(),
    )
    functions.moeyard_linear(ctypes.byref(arguments))
    return y_NQ
