"""Which missing experts are computed from their low-bit copies (after HOBBIT, arXiv 2411.01433).

N rows, E experts, K choices.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ...kernels.values.quantized_weights import SlotWeights
from ...kernels.waves import Waves
from .store import ExpertStore


class Fallback:
    """Copies of all experts in memory, and the rule that says when they are used.

    An expert in a slot is always used as it is. One that is missing is computed from its copy. With
    ``reads_later`` it is then read in the background, and stays until the layer's next turn, so
    that the slots follow the text. With ``above`` it is waited for if it has more than this share
    of the rows' weights: each row's weights are divided by their sum, and the shares of all rows of
    the forward are added up. So 0 waits for every expert, and forwards with many rows, which need
    an expert for many of them, wait for most.
    """

    def __init__(
        self,
        store: ExpertStore,
        copies: Mapping[int, SlotWeights],
        above: float | None = None,
        is_on: bool = True,
        reads_later: bool = True,
    ) -> None:
        self._store = store
        self._copies = copies
        self._above = above
        self._is_on = is_on
        self.reads_later = reads_later
        self._first_layer = min(copies)
        self._used_N = torch.zeros(0, dtype=torch.bool)
        """Rows of this forward that some copy was used for."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Use copies inside the block, for a fallback that is off."""
        before, self._is_on = self._is_on, True
        try:
            yield
        finally:
            self._is_on = before

    def choose(
        self, layer: int, experts: Collection[int], experts_NK: Tensor, weights_NK: Tensor
    ) -> list[int]:
        """Return those of a layer's needed ``experts`` that copies stand in for now."""
        if layer == self._first_layer:
            self._used_N = torch.zeros(len(experts_NK), dtype=torch.bool)
        missing = self._store.missing(layer, experts) if self._is_on else []
        if missing and self._above is not None:
            shares_E = _shares(experts_NK, weights_NK, max(experts) + 1)
            missing = [expert for expert in missing if shares_E[expert] <= self._above]
        if missing:
            self._count(torch.isin(experts_NK, experts_NK.new_tensor(missing)).any(dim=1))
        return missing

    def add(self, layer: int, waves: Waves, experts: Collection[int]) -> None:
        """Compute rows of ``experts`` from the copies."""
        if experts:
            waves.add(self._copies[layer], only=experts)

    def _count(self, uses_N: Tensor) -> None:
        if len(self._used_N) != len(uses_N):  # a router whose K varies: rows are lines of K choices
            self._used_N = torch.zeros_like(uses_N)
        self._store.statistics.copied_tokens += int((uses_N & ~self._used_N).sum())
        self._used_N |= uses_N


def _shares(experts_NK: Tensor, weights_NK: Tensor, num_experts: int) -> list[float]:
    """Return each expert's share of its rows' weights, summed over rows."""
    is_chosen_NK = experts_NK >= 0
    sizes_NK = weights_NK.float().abs() * is_chosen_NK
    shares_NK = sizes_NK / sizes_NK.sum(dim=1, keepdim=True).clamp(min=1e-20)
    ids_R = experts_NK.clamp(min=0).flatten().long()
    shares_E: list[float] = (
        torch.zeros(num_experts).index_add_(0, ids_R, shares_NK.flatten()).tolist()
    )
    return shares_E
