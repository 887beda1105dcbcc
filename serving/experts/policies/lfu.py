"""Least frequently used first out. L MoE layers, E experts of a layer."""

import numpy as np

from .policy import CacheFacts, Key
from .scored import Array, ScoredPolicy


class LeastFrequentlyUsed(ScoredPolicy):
    """Evicts the expert that the fewest forwards needed since the start.

    score = number of forwards that needed the expert. Counts outlive an expert's stay in memory.
    What was popular long ago stays; :class:`.decayed_lfu.DecayedFrequency` forgets.
    """

    def __init__(self, facts: CacheFacts) -> None:
        super().__init__(facts)
        self._counts_LE = np.zeros(self._shape)
        """Forwards that needed an expert."""

    def touch(self, key: Key, rows: int) -> None:
        """Count a need."""
        super().touch(key, rows)
        self._counts_LE[self._now, key[1]] += 1

    def scores(self) -> Array:
        """Return the counts."""
        return self._counts_LE
