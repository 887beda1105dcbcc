"""Measure how fast a device gives experts, with several numbers of threads, in half a second.

The device may be limited by a control group. That lets a burst pass and then stops all reads for up
to a tenth of a second. So stops do not count when ways of reading are compared. The rate counts
them, over whole periods from the end of a stop to the end of another.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ....moe.folders.extents import Chunk
from ....moe.folders.file_reader import Buffer
from .plan import Mode

COMPARE_S, RATE_S = 0.2, 0.3
"""Seconds to compare ways of reading, and to measure the best one."""
MAX_BYTES = 512 << 20
"""Read at most by a probe, about."""
UNIT_BYTES = 1 << 20
"""The most that one read of the probe takes: large enough for full speed, and quick."""
THREADS = (4, 1, 2, 8)
"""Numbers of threads in the order of trying; a slow device may not see them all."""
TOLERANCE = 0.95
"""The fewest threads with this share of the best rate are taken."""
STOP_S, STOP_RATIO = 0.02, 8
"""A pause in which nothing arrives is a stop if it is this long, and this many usual ones long."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way of reading and what it reads per second."""

    mode: Mode
    threads: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """Bytes that a read has brought."""

    at_s: float
    num_bytes: int


class Probe:
    """Reads chunks again and again, and keeps when their bytes arrived."""

    def __init__(self, chunks: Sequence[Chunk], is_cold: bool) -> None:
        """``is_cold`` drops the chunks from the page cache first."""
        self._units = _units(chunks, is_cold)
        self._arrivals: list[Arrival] = []

    def compare(self, modes: Sequence[Mode]) -> list[Way]:
        """Return the best way of each mode, its rate without stops."""
        ends_at = time.perf_counter() + COMPARE_S
        tries = [(threads, mode) for threads in THREADS for mode in modes]
        found: dict[Mode, list[Way]] = {mode: [] for mode in modes}
        for threads, mode in tries:
            if time.perf_counter() > ends_at and found[mode]:
                continue
            way = Way(mode, threads, 0.0)
            started, seconds = time.perf_counter(), COMPARE_S / len(tries)
            arrived = self._read(way, seconds, MAX_BYTES // 4 // len(tries))
            times = [started, *(arrival.at_s for arrival in arrived)]
            moving_s = times[-1] - started - sum(end - start for start, end in _stops(times))
            num_bytes = sum(arrival.num_bytes for arrival in arrived)
            found[mode].append(Way(mode, threads, num_bytes / max(moving_s, 1e-6)))
        return [_fewest_threads(ways) for ways in found.values()]

    def rate(self, way: Way, max_bytes: int | None = None) -> float:
        """Return the bytes per second of one way, stops included."""
        first, started = len(self._arrivals), time.perf_counter()
        self._read(way, RATE_S, max_bytes or MAX_BYTES * 3 // 4)
        # A limit holds for every way, so all that was read counts where there are stops.
        ends = [end for _, end in _stops([arrival.at_s for arrival in self._arrivals])]
        last = self._arrivals[-1].at_s
        if len(ends) >= 2 and ends[-1] - ends[0] >= 0.5 * (last - self._arrivals[0].at_s):
            whole = [a for a in self._arrivals if ends[0] <= a.at_s < ends[-1]]
            return sum(arrival.num_bytes for arrival in whole) / (ends[-1] - ends[0])
        return sum(a.num_bytes for a in self._arrivals[first:]) / (last - started)

    def _read(self, way: Way, seconds: float, max_bytes: int) -> list[Arrival]:
        """Read for some time, at least once per thread, and return what arrived."""
        arrived: list[Arrival] = []
        errors: list[OSError] = []
        lock = threading.Lock()
        ends_at = time.perf_counter() + seconds

        def work() -> None:
            memory = _page_aligned(UNIT_BYTES)
            left = max(1, max_bytes // way.threads)
            while left > 0 and not errors:
                with lock:
                    unit = next(self._units)
                num_bytes = unit.end - unit.start
                buffers, direct = [memory.part(0, num_bytes)], way.mode == "direct"
                try:
                    unit.file.reader.read(buffers, unit.start, direct)
                except OSError as error:
                    errors.append(error)
                    return
                with lock:
                    arrived.append(Arrival(time.perf_counter(), num_bytes))
                left -= num_bytes
                if time.perf_counter() > ends_at:
                    return

        workers = [threading.Thread(target=work, name="probe") for _ in range(way.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
        self._arrivals += arrived
        return arrived


def _fewest_threads(ways: list[Way]) -> Way:
    best = max(way.bytes_per_s for way in ways)
    good = [way for way in ways if way.bytes_per_s >= TOLERANCE * best]
    return min(good, key=lambda way: way.threads)


def _stops(times: Sequence[float]) -> list[tuple[float, float]]:
    """Return beginnings and ends of the pauses in which the device was stopped."""
    if len(times) < 2:
        return []
    usual = float(np.median(np.diff(times)))
    shortest = max(STOP_S, STOP_RATIO * usual)
    return [(start, end) for start, end in pairwise(times) if end - start > shortest]


def _units(chunks: Sequence[Chunk], is_cold: bool) -> Iterator[Chunk]:
    """Yield what a read of the probe takes, again and again. Called under a lock."""
    while True:
        # All at once: what the system then reads ahead of a unit is of use to the next.
        for chunk in chunks if is_cold else ():
            chunk.file.reader.forget(chunk.start, chunk.end - chunk.start)
        for chunk in chunks:
            for start in range(chunk.start, chunk.end, UNIT_BYTES):
                yield Chunk(chunk.file, start, min(start + UNIT_BYTES, chunk.end))


def _page_aligned(num_bytes: int) -> Buffer:
    memory = np.zeros(num_bytes + 4096, np.uint8)
    skip = -memory.ctypes.data % 4096
    part = memory[skip : skip + num_bytes]
    return Buffer(memoryview(part), part.ctypes.data)  # type: ignore[arg-type]
