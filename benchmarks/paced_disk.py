"""A disk of a given speed that gathers no credit while it is idle.

The read limit of a control group counts bytes over a slice of time. A process that computes for a
while may then read faster, until the slice is used up. So reading on demand gets the whole rate on
average, and reading ahead can gain nothing there. A real disk that was idle is not faster later.

Several processes share one disk through a small file.
"""

import fcntl
import os
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path


class PacedDisk:
    """Makes ``os.preadv`` no faster than ``bytes_per_s`` over all threads, read after read.

    With ``shared``, over the threads of all processes that name the same file.
    """

    def __init__(self, bytes_per_s: float | None = None, shared: Path | None = None) -> None:
        self.bytes_per_s = bytes_per_s
        """May change; None = as fast as the disk is."""
        self._read = os.preadv
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._shared = None if shared is None else os.open(shared, os.O_RDWR | os.O_CREAT)
        os.preadv = self._paced  # type: ignore[assignment]

    def _paced(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        rate = self.bytes_per_s
        if rate is None:
            return self._read(descriptor, buffers, offset)
        num_bytes = sum(len(buffer) for buffer in buffers)
        with self._lock:
            ends_at = self._take(num_bytes / rate)
        count = self._read(descriptor, buffers, offset)
        wait_s = ends_at - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        return count

    def _take(self, seconds: float) -> float:
        """Take the disk's next seconds; return when they end. The clock is that of the machine."""
        if self._shared is None:
            self._free_at = max(time.perf_counter(), self._free_at) + seconds
            return self._free_at
        fcntl.flock(self._shared, fcntl.LOCK_EX)
        try:
            known = os.pread(self._shared, 8, 0)
            free_at = struct.unpack("d", known)[0] if len(known) == 8 else 0.0
            ends_at = float(max(time.perf_counter(), free_at) + seconds)
            os.pwrite(self._shared, struct.pack("d", ends_at), 0)
            return ends_at
        finally:
            fcntl.flock(self._shared, fcntl.LOCK_UN)
