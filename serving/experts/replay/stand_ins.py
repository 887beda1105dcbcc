"""What a replay puts in the place of weights, disk and time."""

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ....moe.folders.expert_layouts import ExpertViews
from ..policies.policy import Key
from ..reads import Read


@dataclass(frozen=True, slots=True)
class NoWeights:
    """Takes the place of the memory of slots."""

    slot_of_E: tuple[int, ...] = ()

    def slot_views(self, slot: int) -> ExpertViews:
        """Return nothing to fill."""
        return {}


class NoTier:
    """Takes the place of a disk: there is nothing to do for a read but to wait."""

    def straight(self, key: Key, views: ExpertViews) -> None:
        """Return None: C++ has nothing to do either."""

    def reads(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return no calls."""
        return []


class DiskOnPaper:
    """Takes the place of the read queue: one read at a time, urgent ones first, ``read_s`` each.

    Time passes when compute says so, and while it waits. A read that has begun is finished first.
    """

    def __init__(self, read_s: float = 0.0) -> None:
        self._read_s = read_s
        self._now = 0.0
        self._urgent: deque[Read] = deque()
        self._early: deque[Read] = deque()
        self._current: Read | None = None
        self._num_done = 0
        self._ends = 0.0
        """When the current read ends, or the last one ended."""
        self._num_done = 0

    def clock(self) -> float:
        """Return the seconds that have passed."""
        return self._now

    def compute(self, seconds: float) -> None:
        """Let time pass; reads go on."""
        until = self._now + seconds
        while self._current is not None and self._ends <= until:
            self._finish()
        self._now = until

    def submit(self, read: Read) -> None:
        """Queue a read."""
        (self._urgent if read.is_urgent else self._early).append(read)
        if self._current is None:
            self._start(self._now)

    def make_urgent(self, read: Read) -> bool:
        """Move an early read to the end of the urgent ones."""
        read.is_urgent = True
        if read in self._early:
            self._early.remove(read)
            self._urgent.append(read)
        return True

    def drop(self, read: Read) -> None:
        """Let a read that has begun be finished."""

    def look(self) -> None:
        """Do nothing: reads are marked as time passes."""

    def progress(self) -> tuple[float, float]:
        """Return the reads that were done, and their seconds."""
        return self._num_done, self._num_done * self._read_s

    def cancel(self, read: Read) -> bool:
        """Take back a read that has not begun; say whether that was so."""
        queue = self._urgent if read.is_urgent else self._early
        if read not in queue:
            return False
        queue.remove(read)
        return True

    def wait_for_any(self, reads: Collection[Read]) -> list[Read]:
        """Let time pass until one of ``reads`` is done; return all that are."""
        while not any(read.is_done for read in reads):
            self._wait_for_current()
        return [read for read in reads if read.is_done]

    def wait_for_all(self, reads: Collection[Read]) -> None:
        """Let time pass until all of ``reads`` are done."""
        while not all(read.is_done for read in reads):
            self._wait_for_current()

    def close(self) -> None:
        """Nothing to stop."""

    def _wait_for_current(self) -> None:
        assert self._current is not None and math.isfinite(self._ends), "waits for no read"
        self._now = max(self._now, self._ends)
        self._finish()

    def _start(self, at: float) -> None:
        queue = self._urgent or self._early
        self._current = queue.popleft() if queue else None
        self._ends = at + self._read_s

    def _finish(self) -> None:
        assert self._current is not None
        self._current.is_done = True
        self._num_done += 1
        self._num_done += 1
        self._start(self._ends)
