"""A fixed set of popular experts stays; the others come and go.

L MoE layers, E experts of a layer.
"""

from collections.abc import Iterable

import numpy as np

from ..recorded import RecordedForward
from .policy import CacheFacts
from .scored import Array, ScoredPolicy

HOT_SHARE = 0.5
"""Of the slots, for the fixed set. The others follow the text."""


class HotSet(ScoredPolicy):
    """Evicts the least recently needed expert outside the hot set.

    The hot set are the experts that the most rows of recorded routes visited, in all layers
    together, as many as :data:`HOT_SHARE` of the slots. They come into memory when they are first
    needed. If only hot experts could leave, the least recently needed one of them does.
    """

    def __init__(self, facts: CacheFacts, recorded: Iterable[RecordedForward]) -> None:
        super().__init__(facts)
        rows_LE = count_rows(recorded, self._shape)
        order = np.argsort(-rows_LE, axis=None, kind="stable")[: int(facts.num_slots * HOT_SHARE)]
        self._is_hot_LE = np.zeros(self._shape)
        self._is_hot_LE.ravel()[order[rows_LE.ravel()[order] > 0]] = 1

    def scores(self) -> Array:
        """Return 1 for hot experts, 0 for the others; of equal ones the oldest leaves."""
        return self._is_hot_LE


def count_rows(recorded: Iterable[RecordedForward], shape: tuple[int, int]) -> Array:
    """Return how many rows visited each expert, ``[L, E]``."""
    rows_LE = np.zeros(shape, dtype=np.int64)
    for forward in recorded:
        for place, rows_of in enumerate(forward.rows_of_L):
            for expert, rows in rows_of.items():
                rows_LE[place, expert] += rows
    return rows_LE
