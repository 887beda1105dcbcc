"""The expert MLP of rows that go through a served adapter, some experts at a time.

T tokens, K choices, R = T*K routed rows, N rows of a wave in expert order, n rows of one expert,
E experts, D model width, F expert width, H rows of fc1, P inputs, Q outputs.
"""

from collections.abc import Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import linear, linear_by_group
from .torch_ops.experts import combine_rows
from .torch_ops.loop import Span
from .values.activation import Activation, fc1_parts, gated
from .values.expert_update import ExpertUpdate
from .values.few_bits import FewBitsExpertWeights
from .values.grouping import group_tokens
from .values.quantized_weights import SlotWeights

VECTOR = 64
"""A multiple of the numbers that torch computes at once, in every type."""
FOR_ONE_THREAD = 1 << 14
"""Numbers of an activation that torch does not share between threads."""


class AdaptedWaves:
    """An unfinished sum over rows of one adapter, like :class:`.waves.Waves`.

    The activation stands between the two updates, so kernels that compute an expert in one go
    cannot run it. Each expert multiplies its rows together; one grouped product is for the A of
    all experts, and one for their B. On the CPU a row's bits do not depend on the other rows.
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
        groups = self._groups(range(len(self._bounds) - 1) if only is None else only)
        if not groups:
            return
        starts = [self._bounds[group.slot] for group in groups]
        counts = [group.end - group.start for group in groups]
        lines = [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
        lines_N = torch.cat(lines).to(self._x_TD.device)
        x_ND = self._x_TD.index_select(0, self._tokens_R.index_select(0, lines_N))
        h_NH = self._product(x_ND, experts, groups, 0)
        act_NF = _act(h_NH, experts.activation)
        self._y_RD[lines_N] = self._product(act_NF, experts, groups, 1)

    def result(self) -> Tensor:
        """Return ``y``, ``[T, D]``, once every chosen expert has run."""
        return combine_rows(self._y_RD, self._grouping, self._weights_TK)

    def _groups(self, experts: Iterable[int]) -> list[Span]:
        """Return the experts that have rows, and where those are among the rows of this wave."""
        groups, end = [], 0
        for expert in experts:
            count = self._bounds[expert + 1] - self._bounds[expert]
            if count:
                groups.append(Span(expert, end, end + count))
                end += count
        return groups

    def _product(
        self, x_NP: Tensor, experts: SlotWeights, groups: list[Span], index: int
    ) -> Tensor:
        """Return each row's product with its expert's matrix, fc1 or fc2, and update."""
        parts = []
        for expert, start, end in groups:
            slot = experts.slot(expert)
            assert slot >= 0, f"expert {expert} has rows but no slot"
            y_nQ = linear(x_NP[start:end], _matrix(experts, slot, index, x_NP.dtype))
            bias_Q = experts.biases(slot, x_NP.dtype)[index]
            parts.append(y_nQ if bias_Q is None else y_nQ + bias_Q)
        y_NQ = torch.cat(parts)
        factors = (self._update.fc1_EPD, self._update.fc2_EPF)[index]
        if factors is None:
            return y_NQ
        a_EPI, b_EQP = factors
        low_NP = linear_by_group(x_NP, a_EPI, groups)
        return y_NQ + linear_by_group(low_NP, b_EQP, groups)


def _act(h_NH: Tensor, activation: Activation) -> Tensor:
    """Return the activation of each row; its bits do not depend on the other rows.

    Torch computes the last numbers of a piece of memory with other instructions, and threads cut
    pieces anywhere. So rows are filled up to whole vectors, and pieces are too small for threads.
    """
    parts = len(fc1_parts(activation))
    d_expert = h_NH.shape[1] // parts
    h_NH = F.pad(h_NH.unflatten(1, (parts, -1)), (0, -d_expert % VECTOR)).flatten(1)
    num_rows = max(1, 2 * FOR_ONE_THREAD // h_NH.shape[1])
    # A single row is contiguous, which some operators compute otherwise: one row of zeros more.
    pieces = [F.pad(part_nH, (0, 0, 0, 1)) for part_nH in h_NH.split(num_rows)]
    return torch.cat([gated(part_nH, activation)[:-1, :d_expert] for part_nH in pieces])


def _matrix(experts: SlotWeights, slot: int, index: int, dtype: torch.dtype) -> Tensor:
    """Return fc1 or fc2 of a slot; of experts in few bits, one matrix at a time is widened."""
    if isinstance(experts, FewBitsExpertWeights):
        widened: Tensor = (experts.fc1, experts.fc2)[index].dequantize(slot, dtype)
        return widened
    return experts.matrices(slot, dtype)[index]
