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


class Foreteller:
    """Names the best experts of some layers' routers, with fixed weights.

    Logits are ``x @ weight.T + bias``. With ``corrections`` scores are ``sigmoid(logits) +
    corrections``, else the logits. Chances fall from the score of the last of ``choices`` on:
    ``sigmoid(sharpness * (score - last) / (best - worst))``.
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
        """``weight`` is fp32 or bf16, the others are fp32; ``named`` is W."""
        assert choices <= named <= bias_SE.shape[1], "more are named than there are"
        self._weight_RD, self._bias_SE, self._corrections_SE = weight_RD, bias_SE, corrections_SE
        self._choices, self._named, self._sharpness = choices, named, sharpness
        how = (weight_RD, bias_SE, corrections_SE, choices, named, sharpness)
        self._cpp = CppForeteller(*how)

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
        logits_TR = F.linear(x_TD, self._weight_RD).float()
        scores_TSE = logits_TR.unflatten(1, self._bias_SE.shape) + self._bias_SE
        if self._corrections_SE is not None:
            scores_TSE = scores_TSE.sigmoid() + self._corrections_SE
        best_TSW, experts_TSW = scores_TSE.topk(self._named, dim=2)
        range_TS1 = best_TSW[:, :, :1] - scores_TSE.amin(dim=2, keepdim=True) + 1e-6
        margin_TSW = (best_TSW - best_TSW[:, :, self._choices - 1 : self._choices]) / range_TS1
        chances_TSW = (self._sharpness * margin_TSW).sigmoid()
        return experts_TSW.int().numpy(), chances_TSW.numpy()
