"""The expert MLP of rows that go through a served adapter, some experts at a time.

T tokens, K choices, R = T*K routed rows, D model width, P inputs, n rows of one expert.
"""

from collections.abc import Collection

from torch import Tensor

from .linear import linear
from .torch_ops.experts import combine_rows
from .values.activation import gated
from .values.expert_update import ExpertUpdate
from .values.grouping import group_tokens
from .values.quantized_weights import SlotWeights


class AdaptedWaves:
    """An unfinished sum over rows of one adapter, like :class:`.waves.Waves`.

    The activation stands between the two updates, so kernels that compute an expert in one go
    cannot run it. Each (adapter, expert) pair multiplies its rows together, with the experts'
    matrices and with A and B. On the CPU a row's bits do not depend on the other rows.
    """

    def __init__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        num_experts: int,
        update: ExpertUpdate,
    ) -> None:
        self._x_TD, self._weights_TK, self._update = x_TD, weights_TK, update
        self._grouping = group_tokens(experts_TK, num_experts)
        self._bounds = self._grouping.offsets_E1.tolist()
        self._tokens_R = self._grouping.tokens_R
        self._y_RD = x_TD.new_empty(len(self._tokens_R), x_TD.shape[1])

    def add(self, experts: SlotWeights, only: Collection[int] | None = None) -> None:
        """Run all experts in slots, or ``only`` some of them."""
        for expert in range(len(self._bounds) - 1) if only is None else only:
            start, end = self._bounds[expert], self._bounds[expert + 1]
            if start == end:
                continue
            slot = experts.slot(expert)
            assert slot >= 0, f"expert {expert} has rows but no slot"
            x_nD = self._x_TD.index_select(0, self._tokens_R[start:end])
            self._y_RD[start:end] = self._expert(x_nD, experts, expert, slot)

    def result(self) -> Tensor:
        """Return ``y``, ``[T, D]``, once every chosen expert has run."""
        return combine_rows(self._y_RD, self._grouping, self._weights_TK)

    def _expert(self, x_nD: Tensor, experts: SlotWeights, expert: int, slot: int) -> Tensor:
        fc1_HD, fc2_DF = experts.matrices(slot, x_nD.dtype)
        bias1_H, bias2_D = experts.biases(slot, x_nD.dtype)
        h_nH = _product(x_nD, fc1_HD, bias1_H, self._update.fc1_EPD, expert)
        act_nF = gated(h_nH, experts.activation)
        return _product(act_nF, fc2_DF, bias2_D, self._update.fc2_EPF, expert)


def _product(
    x_nP: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
    expert: int,
) -> Tensor:
    y_nQ = linear(x_nP, weight)
    if bias is not None:
        y_nQ = y_nQ + bias
    if factors is None:
        return y_nQ
    a, b = factors
    return y_nQ + linear(linear(x_nP, a[expert]), b[expert])
