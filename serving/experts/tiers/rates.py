"""How long each tier takes for an expert, as measured while it serves."""

import threading
from typing import Literal, get_args

Source = Literal["host", "other_node", "disk"]
"""This node's memory, another node's memory, the model folder."""
SOURCES: tuple[Source, ...] = get_args(Source)

NEWEST = 0.1
"""Weight of the newest measurement in a mean that forgets."""
ASK_AGAIN = 64
"""A source that was slower is asked once in so many reads: it may have become faster."""


class Rates:
    """Mean seconds per expert and source, and reads of each. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mean_s: dict[Source, float] = {}
        self._refused: dict[Source, int] = {}
        self.reads: dict[Source, int] = dict.fromkeys(SOURCES, 0)
        """Experts that came from each source."""
        self.bytes: dict[Source, int] = dict.fromkeys(SOURCES, 0)
        """Bytes of these experts."""

    def seconds(self, source: Source) -> float | None:
        """Return the mean, or None before the first read."""
        return self._mean_s.get(source)

    def observe(self, source: Source, seconds: float, num_bytes: int) -> None:
        """Book an expert of ``num_bytes`` that came from ``source``."""
        with self._lock:
            mean_s = self._mean_s.get(source, seconds)
            self._mean_s[source] = mean_s + NEWEST * (seconds - mean_s)
            self.reads[source] += 1
            self.bytes[source] += num_bytes

    def add(self, source: Source, num_bytes: int) -> None:
        """Book ``num_bytes`` more that came from ``source`` for experts that are booked."""
        with self._lock:
            self.bytes[source] += num_bytes

    def is_worth_asking(self, source: Source) -> bool:
        """Say whether ``source`` should be asked before the disk."""
        with self._lock:
            mine_s, disk_s = self._mean_s.get(source), self._mean_s.get("disk")
            if mine_s is None or disk_s is None or mine_s < disk_s:
                return True
            count = self._refused.get(source, 0) + 1
            self._refused[source] = count % ASK_AGAIN
            return count == ASK_AGAIN
