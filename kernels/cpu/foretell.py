"""What the routers of some layers would choose, on the C++ kernels.

T tokens, D model width, S layers, E experts, W experts that are named for each row and layer.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .library import TYPES, address, functions_for
from .structures import ForetellArguments


class CppForeteller:
    """See :class:`moeyard.kernels.foretell.Foreteller`. A step asks once for each layer, so what
    does not change is filled in once.
    """

    def __init__(
        self,
        weight_RD: Tensor,
        bias_SE: Tensor,
        corrections_SE: Tensor | None,
        choices: int,
        named: int,
        sharpness: float,
    ) -> None:
        self._weight_RD = weight_RD
        self._kept = (bias_SE, corrections_SE)  # C++ has their addresses
        num_layers, num_experts = bias_SE.shape
        self._shape = (num_layers, named)
        self._arguments = ForetellArguments(
            type=TYPES.get(weight_RD.dtype, -1),
            d_model=weight_RD.shape[1],
            layers=num_layers,
            num_experts=num_experts,
            choices=choices,
            named=named,
            is_sigmoid=corrections_SE is not None,
            sharpness=sharpness,
            weight=weight_RD.data_ptr(),
            bias=bias_SE.data_ptr(),
            corrections=address(corrections_SE),
        )
        number = num_layers * named
        self._experts, self._chances = (ctypes.c_int32 * number)(), (ctypes.c_float * number)()
        """Of one row, filled anew by each call."""

    def __call__(self, x_TD: Tensor) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return experts and chances, or None if the kernels cannot run."""
        functions = functions_for(x_TD, self._weight_RD)
        if functions is None:
            return None
        rows = len(x_TD)
        experts_TSW = np.empty((rows, *self._shape), dtype=np.int32)
        chances_TSW = np.empty((rows, *self._shape), dtype=np.float32)
        addresses = experts_TSW.ctypes.data, chances_TSW.ctypes.data
        self._call(functions, x_TD, rows, *addresses)
        return experts_TSW, chances_TSW

    def of_row(self, x_1D: Tensor) -> tuple[list[int], list[float]] | None:
        """Return S times W experts and chances, or None if the kernels cannot run."""
        functions = functions_for(x_1D, self._weight_RD)
        if functions is None:
            return None
        addresses = ctypes.addressof(self._experts), ctypes.addressof(self._chances)
        self._call(functions, x_1D, 1, *addresses)
        return self._experts[:], self._chances[:]

    def _call(
        self, functions: ctypes.CDLL, x_TD: Tensor, rows: int, experts: int, chances: int
    ) -> None:
        arguments = self._arguments
        arguments.tokens, arguments.threads = rows, torch.get_num_threads()
        arguments.x = x_TD.data_ptr()
        arguments.experts, arguments.chances = experts, chances
        functions.moeyard_foretell(ctypes.byref(arguments))
