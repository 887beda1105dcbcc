"""From rows to the experts that the routers of some layers would choose: C++ or torch.

T tokens, D model width, S layers, E experts, R = S * E, W experts that are named.
"""

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .cpu.foretell import CppForeteller
from .trust import may_use_cpp
from .values.next_routers import NextRouters


class Foreteller:
    """Names the best experts of some layers' routers, with fixed weights.

    Logits are ``x @ weight.T + bias``. With ``corrections`` scores are ``sigmoid(logits) +
    corrections``, else the logits. Chances fall from the score of the last of ``choices`` on:
    ``sigmoid(sharpness * (score - last) / (best - worst))``.
    """

    def __init__(self, routers: NextRouters) -> None:
        num_experts = routers.bias_SE.shape[1]
        assert routers.choices <= routers.named <= num_experts, "more are named than there are"
        self._routers, self._cpp = routers, CppForeteller(routers)

    def __call__(self, x_TD: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the best experts, int32 ``[T, S, W]``, best first, and their chances, fp32.

        Ties go to any expert. ``x`` has the type of the weights.
        """
        if may_use_cpp(x_TD):
            found = self._cpp(x_TD.contiguous())
            if found is not None:
                return found
        return self._by_torch(x_TD)

    def of_row(self, x_1D: Tensor) -> tuple[list[int], list[float]]:
        """Return S times W experts and chances of one row.

        Lists and not arrays: to make those takes longer than to compute them.
        """
        if may_use_cpp(x_1D):
            found = self._cpp.of_row(x_1D.contiguous())
            if found is not None:
                return found
        experts_1SW, chances_1SW = self._by_torch(x_1D)
        return experts_1SW.ravel().tolist(), chances_1SW.ravel().tolist()

    @torch.no_grad()
    def _by_torch(self, x_TD: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
        weight_RD, bias_SE, corrections_SE, choices, named, sharpness = self._routers
        logits_TR = F.linear(x_TD, weight_RD).float()
        scores_TSE = logits_TR.unflatten(1, bias_SE.shape) + bias_SE
        if corrections_SE is not None:
            scores_TSE = scores_TSE.sigmoid() + corrections_SE
        best_TSW, experts_TSW = scores_TSE.topk(named, dim=2)
        range_TS1 = best_TSW[:, :, :1] - scores_TSE.amin(dim=2, keepdim=True) + 1e-6
        margin_TSW = (best_TSW - best_TSW[:, :, choices - 1 : choices]) / range_TS1
        chances_TSW = (sharpness * margin_TSW).sigmoid()
        return experts_TSW.int().numpy(), chances_TSW.numpy()
