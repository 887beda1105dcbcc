"""Numbers for sequences, which stay with them from forward to forward."""

from typing import Any
from weakref import WeakKeyDictionary

from ..batch import Batch
from ..kv_cache import CachePosition
from .rows import Phase


class SequenceNumbers:
    """Numbers sequences as they come. A cache is a sequence; a text without one is always new."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._taken = 0

    def of(self, batch: Batch) -> tuple[list[int], list[Phase]]:
        """Return the number and the phase of each sequence of a forward.

        One row that follows others is a generated token. Prompts may come in several pieces.
        Positions of one text have its number.
        """
        numbers, phases = [], []
        caches = batch.caches or [None] * len(batch.lengths)
        for cache, rows in zip(caches, batch.lengths, strict=True):
            if isinstance(cache, CachePosition):
                cache = cache.text
            known = None if cache is None else self._known.get(cache)
            is_generated = known is not None and rows == 1
            phases.append(Phase.DECODE if is_generated else Phase.PREFILL)
            if known is None:
                known = self._taken
                self._taken += 1
                if cache is not None:
                    self._known[cache] = known
            numbers.append(known)
        return numbers, phases
