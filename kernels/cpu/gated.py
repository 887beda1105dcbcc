"""The activation of an MLP on the C++ kernels. N rows, F inner width, H columns before it."""

import ctypes

import torch
from torch import Tensor

from ..values.activation import ACTIVATIONS, Activation, fc1_parts
from .library import TYPES, functions_for
from .structures import GatedArguments


def gated(h_NH: Tensor, activation: Activation) -> Tensor | None:
    """Return the activation's values, ``[N, F]``, or None if the kernels cannot run."""
    functions = functions_for(h_NH)
    if functions is None or h_NH.ndim != 2:
        return None
    num_rows, width = h_NH.shape[0], h_NH.shape[1] // len(fc1_parts(activation))
    y_NF = h_NH.new_empty(num_rows, width)
    arguments = GatedArguments(
        type=TYPES[h_NH.dtype],
        activation=ACTIVATIONS.index(activation),
        rows=num_rows,
        width=width,
        threads=torch.get_num_threads(),
        x=h_NH.data_ptr(),
        y=y_NF.data_ptr(),
    )
    functions.moeyard_gated(ctypes.byref(arguments))
    return y_NF
