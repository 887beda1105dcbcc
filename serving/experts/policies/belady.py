"""The bound: evict what is needed farthest in the future. Only a replay knows the future."""

import math
from collections import deque
from collections.abc import Container, Iterable
from heapq import heapify, heappop, heappush

from ..forwards import Forward
from .policy import Key

SPARE_ENTRIES = 64


class Belady:
    """Evicts the expert whose next need is farthest away (Belady's MIN, 1966).

    ``needs`` are all that compute will ask for: the experts of one layer of one forward after
    another. Where a layer's experts fit into the slots, no policy that reads on demand misses less
    often.

    Cost: a need and a victim take the logarithm of the number of slots, on average.
    """

    def __init__(self, needs: Iterable[Iterable[Key]]) -> None:
        self._turns: dict[Key, deque[int]] = {}
        """When each expert will be needed."""
        for turn, keys in enumerate(needs):
            for key in keys:
                self._turns.setdefault(key, deque()).append(turn)
        self._here: set[Key] = set()
        self._heap: list[tuple[float, Key]] = []
        """The farthest one first. Entries with another turn than an expert's next are out of
        date."""

    def begin(self, forward: Forward) -> None:
        """Nothing: what a forward needs is known."""

    def touch(self, key: Key, rows: int) -> None:
        """Go on to the next need of ``key``."""
        self._turns[key].popleft()
        if key in self._here:
            self._push(key)

    def expect(self, key: Key) -> None:
        """Nothing: it was known."""

    def add(self, key: Key) -> None:
        """Take ``key`` among those that may leave."""
        self._here.add(key)
        self._push(key)

    def forget(self, key: Key) -> None:
        """Take ``key`` from those that may leave."""
        self._here.discard(key)

    def victim(self, protected: Container[Key]) -> Key | None:
        """Return the one that is needed last, or never again."""
        passed_over, found = [], None
        while self._heap and found is None:
            entry = heappop(self._heap)
            key = entry[1]
            if key not in self._here or entry[0] != self._order(key):
                continue
            passed_over.append(entry)
            found = None if key in protected else key
        for entry in passed_over:
            heappush(self._heap, entry)
        return found

    def _order(self, key: Key) -> float:
        turns = self._turns.get(key)
        return -turns[0] if turns else -math.inf

    def _push(self, key: Key) -> None:
        heappush(self._heap, (self._order(key), key))
        if len(self._heap) > 4 * len(self._here) + SPARE_ENTRIES:
            self._heap = [(self._order(key), key) for key in self._here]
            heapify(self._heap)
