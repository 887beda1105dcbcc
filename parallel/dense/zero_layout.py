"""Which numbers of each parameter ZeRO gives a rank, and where they lie in the rank's flat tensor.

Ranks compute this for themselves. deepspeed.py compares it with what DeepSpeed did.
"""

from collections.abc import Sequence
from typing import NamedTuple

ALIGNED = 2
"""DeepSpeed makes every rank's range of stages 1 and 2 a multiple of this."""


class Place(NamedTuple):
    """The numbers of one parameter that are a rank's; none if ``start == stop``."""

    start: int
    stop: int
    offset: int
    """Where they begin in the rank's flat tensor."""


def places(stage: int, numels: Sequence[int], ranks: int, rank: int) -> list[Place]:
    """Return the place of each parameter of ``numels`` numbers; stages 1 to 3."""
    if stage == 3:
        return _in_each(numels, ranks, rank)
    return _in_a_row(numels, ranks, rank)


def _in_a_row(numels: Sequence[int], ranks: int, rank: int) -> list[Place]:
    """Stages 1 and 2: parameters lie one behind the other, and ranks take equal ranges of that."""
    multiple = ALIGNED * ranks
    size = -(-sum(numels) // multiple) * ALIGNED
    found, begin = [], -rank * size
    for numel in numels:
        start, stop = (min(max(edge - begin, 0), numel) for edge in (0, size))
        found.append(Place(start, stop, max(begin, 0) if start < stop else 0))
        begin += numel
    return found


def _in_each(numels: Sequence[int], ranks: int, rank: int) -> list[Place]:
    """Stage 3: ranks take equal ranges of every parameter; those of the last ones may be short."""
    found, offset = [], 0
    for numel in numels:
        size = -(-numel // ranks)
        start = min(rank * size, numel)
        found.append(Place(start, min(start + size, numel), offset))
        offset += size
    return found
