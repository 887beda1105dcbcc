"""Root-mean-square norm on the C++ kernels. H width of a row."""

import ctypes

import torch
from torch import Tensor

from .library import TYPES, functions_for
from .structures import NormArguments


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor | None:
    """Return ``weight * x / rms(x)`` over the last dimension, or None if the kernels cannot run."""
    functions = functions_for(x, weight_H)
    if functions is None or x.shape[-1:] != weight_H.shape:
        return None
    y, width = torch.empty_like(x), weight_H.shape[0]
    arguments = NormArguments(
        type=TYPES[x.dtype],
        rows=x.numel() // width,
        width=width,
        threads=torch.get_num_threads(),
        epsilon=epsilon,
        x=x.data_ptr(),
        weight=weight_H.data_ptr(),
        y=y.data_ptr(),
    )
    functions.moeyard_norm(ctypes.byref(arguments))
    return y
