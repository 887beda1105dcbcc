"""A disk of a given speed that gathers no credit while it is idle.

The read limit of a control group counts bytes over a slice of time. A process that computes for a
while may then read faster, until the slice is used up. So reading on demand gets the whole rate on
average, and reading ahead can gain nothing there. A real disk that was idle is not faster later.
"""

import os
import threading
import time
from collections.abc import Sequence


class PacedDisk:
    """Makes ``os.preadv`` no faster than ``bytes_per_s`` over all threads, read after read."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self.bytes_per_s = bytes_per_s
        """May change; None = as fast as the disk is."""
        self._read = os.preadv
        self._lock = threading.Lock()
        self._free_at = 0.0
        os.preadv = self._paced  # type: ignore[assignment]

    def _paced(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        rate = self.bytes_per_s
        if rate is None:
            return self._read(descriptor, buffers, offset)
        num_bytes = sum(len(buffer) for buffer in buffers)
        with self._lock:
            self._free_at = max(time.perf_counter(), self._free_at) + num_bytes / rate
            ends_at = self._free_at
        count = self._read(descriptor, buffers, offset)
        wait_s = ends_at - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        return count
