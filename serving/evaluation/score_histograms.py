"""How often each size of a score occurs on a text.

n rows of one expert, E experts, C channels.
"""

import torch
from torch import Tensor

from ...kernels.values.activation import gated
from ...kernels.values.channel_weights import gate_values
from ...moe.experts.resident import Experts
from ..experts.sparsity import KINDS, Key, Score

OWN_ROWS = 2000
"""An expert with fewer rows takes the threshold of its layer."""
LOWEST, HIGHEST, PER_OCTAVE = -40, 24, 64
"""Histograms are of log2 of the score: 1 % wide."""


class Histograms:
    """How often each size of a score occurs, by layer, kind and expert."""

    def __init__(self, score: Score, norms: dict[Key, Tensor]) -> None:
        self._score: Score = score
        self._norms = norms
        self._counts: dict[tuple[Key, int], Tensor] = {}
        self._rows: dict[tuple[Key, int], int] = {}

    def see(self, layer: int, expert: int, experts: Experts, x_nD: Tensor, h_nH: Tensor) -> None:
        """Count the scores of an expert's rows."""
        for kind in KINDS[self._score]:
            if kind == "x":
                values_nC = x_nD
            elif kind == "gate":
                values_nC = gate_values(h_nH, experts.activation)
            else:
                values_nC = gated(h_nH, experts.activation)
            scores_nC = values_nC.float().abs()
            if (layer, kind) in self._norms:
                scores_nC = scores_nC * self._norms[layer, kind][expert]
            octaves = scores_nC.log2().clamp(LOWEST, HIGHEST - 1 / PER_OCTAVE)
            bins = ((octaves - LOWEST) * PER_OCTAVE).long().flatten()
            counts = bins.bincount(minlength=(HIGHEST - LOWEST) * PER_OCTAVE)
            key = ((layer, kind), expert)
            self._counts[key] = self._counts.get(key, 0) + counts
            self._rows[key] = self._rows.get(key, 0) + len(x_nD)

    def thresholds(self, key: Key, target: float, num_experts: int) -> Tensor:
        """Return the threshold of each expert, fp32 ``[E]``."""
        own = {expert: counts for (k, expert), counts in self._counts.items() if k == key}
        pooled = _quantile(torch.stack(list(own.values())).sum(dim=0), target)
        found = torch.full((num_experts,), pooled, dtype=torch.float32)
        for expert, counts in own.items():
            if self._rows[key, expert] >= OWN_ROWS:
                found[expert] = _quantile(counts, target)
        return found


def _quantile(counts: Tensor, share: float) -> float:
    """Return the score below which ``share`` of the counted ones are; 0 for none of them."""
    if share == 0:
        return 0.0
    below = counts.cumsum(dim=0).double() / counts.sum()
    place = int(torch.searchsorted(below, share))
    before = float(below[place - 1]) if place else 0.0
    part = (share - before) / max(1e-12, float(below[place]) - before)
    return float(2 ** (LOWEST + (place + part) / PER_OCTAVE))
