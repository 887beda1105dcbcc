"""The expert MLP without gradients, some experts at a time.

T tokens, K choices, D model width.
"""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from .cpu.experts import CppWaves, can_run
from .torch_ops.experts import combine_rows, expert_rows
from .values.grouping import group_tokens
from .values.quantized_weights import AnyExperts


class Waves(Protocol):
    """A sum ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)`` in the making.

    Every routed row has its own line, which its expert fills once; the lines are combined in k
    order at the end. So the bits are the same whichever waves the experts come in.
    """

    def add(self, experts: AnyExperts, only: Collection[int] | None = None) -> None:
        """Run experts that are here, all or ``only`` some of them."""
        ...

    def result(self) -> Tensor:
        """Return ``y``, ``[T, D]``, once every chosen expert has run."""
        ...


class TorchWaves:
    """On torch's matrix products."""

    def __init__(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int
    ) -> None:
        self._x_TD, self._weights_TK = x_TD, weights_TK
        self._grouping = group_tokens(experts_TK, num_experts)
        self._y_RD: Tensor | None = None

    def add(self, experts: AnyExperts, only: Collection[int] | None = None) -> None:
        """Run experts that are here, all or ``only`` some of them."""
        self._y_RD = expert_rows(self._x_TD, self._grouping, experts, only=only, out_RD=self._y_RD)

    def result(self) -> Tensor:
        """Return ``y``, ``[T, D]``."""
        y_RD = self._y_RD
        if y_RD is None:  # no token chose any expert
            y_RD = self._x_TD.new_empty(self._grouping.order_R.numel(), self._x_TD.shape[1])
        return combine_rows(y_RD, self._grouping, self._weights_TK)


def start_waves(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Waves:
    """Begin a sum on the fastest backend that takes these rows."""
    if can_run(x_TD, weights_TK):
        return CppWaves(x_TD, experts_TK, weights_TK)
    return TorchWaves(x_TD, experts_TK, weights_TK, num_experts)
