"""What the routers of some layers would choose, on the C++ kernels.

T tokens, D model width, S layers, E experts, W experts that are named for each row and layer.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..values.next_routers import NextRouters
from .library import TYPES, address, functions_for
from .structures import ForetellArguments


class CppForeteller:
    """See :class:`moeyard.kernels.foretell.Foreteller`. A step asks once for each layer, so what
    does not change is filled in once.
    """

    def __init__(self, routers: NextRouters) -> None:
        self._routers = routers  # C++ has the addresses of its tensors
        num_layers, num_experts = routers.bias_SE.shape
        self._shape = (num_layers, routers.named)
        self._arguments = ForetellArguments(
            type=TYPES.get(routers.weight_RD.dtype, -1),
            d_model=routers.weight_RD.shape[1],
            layers=num_layers,
            num_experts=num_experts,
            choices=routers.choices,
            named=routers.named,
            is_sigmoid=routers.corrections_SE is not None,
            sharpness=routers.sharpness,
            weight=routers.weight_RD.data_ptr(),
            bias=routers.bias_SE.data_ptr(),
            corrections=address(routers.corrections_SE),
        )
        number = num_layers * routers.named
        self._experts, self._chances = (ctypes.c_int32 * number)(), (ctypes.c_float * number)()
        """Of one row, filled anew by each call."""

    def __call__(self, x_TD: Tensor) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return experts and chances, or None if the kernels cannot run."""
        functions = functions_for(x_TD, self._routers.weight_RD)
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
        functions = functions_for(x_1D, self._routers.weight_RD)
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
