"""What the routers of some layers would choose, on the C++ kernels.

T tokens, D model width, S layers, E experts, W experts that are named for each row and layer.
"""

import ctypes

import torch
from torch import Tensor

from .library import TYPES, address, empty_fp32, functions_for
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

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return experts and chances, or None if the kernels cannot run."""
        functions = functions_for(x_TD, self._weight_RD)
        if functions is None:
            return None
        experts_TSW = torch.empty(len(x_TD), *self._shape, dtype=torch.int32, device="cpu")
        chances_TSW = empty_fp32(len(x_TD), *self._shape)
        arguments = self._arguments
        arguments.tokens, arguments.threads = len(x_TD), torch.get_num_threads()
        arguments.x = x_TD.data_ptr()
        arguments.experts, arguments.chances = experts_TSW.data_ptr(), chances_TSW.data_ptr()
        functions.moeyard_foretell(ctypes.byref(arguments))
        return experts_TSW, chances_TSW
