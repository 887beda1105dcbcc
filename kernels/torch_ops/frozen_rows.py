"""Rows of frozen experts in expert order, the waves in which their matrices come, and the way back.

T tokens, K choices, R = T*K routed rows, N <= R rows that have an expert, S slots, D model width,
F expert width, H rows of fc1.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..values.expert_weights import ExpertWeights
from ..values.frozen import FrozenExperts
from ..values.grouping import Grouping, group_tokens
from ..values.quantized_weights import SlotWeights
from .loop import Span

Bias = Tensor | None


@dataclass(frozen=True, slots=True)
class Wave:
    """Matrices that are here now, and the rows of their experts."""

    fc1_SHD: Tensor
    fc2_SDF: Tensor
    spans: list[Span]
    """Rows, by slot of the two."""
    biases: list[tuple[Bias, Bias]]
    """Of each span: ``[H]`` and ``[D]``, or None."""


class FrozenRows:
    """The rows of one call."""

    def __init__(self, experts_TK: Tensor, experts: FrozenExperts) -> None:
        self.experts = experts
        self._grouping: Grouping = group_tokens(experts_TK, experts.num_experts)
        bounds = list(pairwise(self._grouping.offsets_E1.tolist()))
        self._bounds = {e: bound for e, bound in enumerate(bounds) if bound[0] < bound[1]}
        self.num_rows = bounds[-1][1]
        self.spans = [Span(experts.slot(e), *bound) for e, bound in self._bounds.items()]
        """The rows of every expert, by slot of the low-rank updates."""
        absent = next((e for e in self._bounds if experts.slot(e) < 0), None)
        assert absent is None, f"expert {absent} has rows but no slot"
        # Rows without an expert read a line of zeros after the last row.
        self._lines_R = self._grouping.inverse_R.clamp(max=self.num_rows)

    def of(self, values_TD: Tensor) -> Tensor:
        """Return the line of each row's token, ``[N, D]``."""
        return values_TD.index_select(0, self._grouping.tokens_R[: self.num_rows])

    def of_choices(self, values_TK: Tensor) -> Tensor:
        """Return the value of each row's choice, ``[N, 1]``."""
        rows_N = self._grouping.order_R[: self.num_rows]
        return values_TK.reshape(-1).index_select(0, rows_N).unsqueeze(-1)

    def by_choice(self, values_ND: Tensor) -> Tensor:
        """Return the rows by token and choice, ``[T, K, D]``; 0 without an expert."""
        padded_ND = torch.cat([values_ND, values_ND.new_zeros(1, values_ND.shape[1])])
        return padded_ND.index_select(0, self._lines_R).unflatten(
            0, (-1, self._grouping.num_choices)
        )

    def waves(self, dtype: torch.dtype) -> Iterator[Wave]:
        """Yield the frozen matrices in ``dtype`` as they come; their memory is used again."""
        if not self._bounds:
            return
        rows_of = {expert: end - start for expert, (start, end) in self._bounds.items()}
        with closing(self.experts.stream(rows_of)) as stream:
            for ready, weights in stream:
                yield from self._waves_of(ready, weights, dtype)

    def _waves_of(
        self, ready: list[int], weights: SlotWeights, dtype: torch.dtype
    ) -> Iterator[Wave]:
        spans = [Span(weights.slot(expert), *self._bounds[expert]) for expert in ready]
        biases = [weights.biases(span.slot, dtype) for span in spans]
        if isinstance(weights, ExpertWeights):
            assert weights.fc1_SHD.dtype == dtype, "the experts have another type"
            yield Wave(weights.fc1_SHD, weights.fc2_SDF, spans, biases)
            return
        for span, bias in zip(spans, biases, strict=True):  # one expert at a time is dequantized
            fc1_HD, fc2_DF = weights.matrices(span.slot, dtype)
            here = Span(0, span.start, span.end)
            yield Wave(fc1_HD.unsqueeze(0), fc2_DF.unsqueeze(0), [here], [bias])
