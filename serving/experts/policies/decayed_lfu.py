"""Least frequently used first out, where old needs count less. L MoE layers, E experts."""

import numpy as np

from ..forwards import Forward
from .policy import CacheFacts, Key
from .scored import Array, ScoredPolicy

HALF_LIFE = 16.0
"""Forwards after which a need counts half."""
LARGEST_WEIGHT = 1e100


class DecayedFrequency(ScoredPolicy):
    """Evicts the expert with the smallest decayed count of needs.

    score = sum over the forwards t that needed the expert of 2^-((now - t) / half-life). With a
    half-life near 0 this is LRU, with an infinite one LFU. It is the LRFU policy of Lee et al.
    (IEEE Transactions on Computers, 2001), with time counted in forwards.

    Nothing is multiplied as time passes: later needs weigh more instead.
    """

    def __init__(self, facts: CacheFacts, half_life: float = HALF_LIFE) -> None:
        super().__init__(facts)
        self._counts_LE = np.zeros(self._shape)
        self._growth = 2 ** (1 / half_life)
        self._weight = 1.0
        """Of a need in this forward."""

    def begin(self, forward: Forward) -> None:
        """Let all earlier needs count a little less."""
        super().begin(forward)
        self._weight *= self._growth
        if self._weight > LARGEST_WEIGHT:
            self._counts_LE /= self._weight
            self._weight = 1.0

    def touch(self, key: Key, rows: int) -> None:
        """Count a need."""
        super().touch(key, rows)
        self._counts_LE[self._now, key[1]] += self._weight

    def scores(self) -> Array:
        """Return the counts, up to a common factor."""
        return self._counts_LE
