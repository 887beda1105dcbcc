"""Measure how fast a device gives experts, with several numbers of threads, in half a second.

The device may be limited by a control group, which lets a burst pass and then stops all reads for
up to a tenth of a second. So ways of reading are compared by the median time of a read, which does
not see the stops, and the rate is that of the best way over the rest of the time, as the slope of a
line through the bytes read so far.
"""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from ....moe.folders.extents import Chunk
from ....moe.folders.file_reader import Buffer
from .plan import Mode

COMPARE_S, RATE_S = 0.2, 0.3
"""Seconds to compare ways of reading, and to measure the best one."""
MAX_BYTES = 256 << 20
"""Read at most by a probe, about."""
UNIT_BYTES = 1 << 20
"""The most that one read of the probe takes: large enough for full speed, and quick."""
THREADS = (4, 1, 2, 8)
"""Numbers of threads in the order of trying; a slow device may not see them all."""
TOLERANCE = 0.95
"""The fewest threads with this share of the best rate are taken."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way of reading and what it reads per second."""

    mode: Mode
    threads: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class _Done:
    at_s: float
    seconds: float
    num_bytes: int


def compare(chunks: Sequence[Chunk], modes: Sequence[Mode], is_cold: bool) -> list[Way]:
    """Return the best way of each mode, its rate free of stops.

    ``is_cold`` drops what is about to be read from the page cache first.
    """
    units = _units(chunks, is_cold)
    ends_at = time.perf_counter() + COMPARE_S
    tries = [(threads, mode) for threads in THREADS for mode in modes]
    found: dict[Mode, list[Way]] = {mode: [] for mode in modes}
    for threads, mode in tries:
        if time.perf_counter() > ends_at and found[mode]:
            continue
        max_bytes = MAX_BYTES // 2 // len(tries)
        done = _read(units, mode, threads, COMPARE_S / len(tries), max_bytes)
        typical_s, num_bytes = (
            median(read.seconds for read in done),
            sum(read.num_bytes for read in done) / len(done),
        )
        found[mode].append(Way(mode, threads, threads * num_bytes / typical_s))
    return [_fewest_threads(ways) for ways in found.values()]


def measure(
    chunks: Sequence[Chunk], way: Way, is_cold: bool, max_bytes: int | None = None
) -> float:
    """Return the bytes per second of one way, stops included."""
    done = _read(
        _units(chunks, is_cold), way.mode, way.threads, RATE_S, max_bytes or MAX_BYTES // 2
    )
    at_s = np.array([read.at_s for read in done])
    so_far = np.cumsum([read.num_bytes for read in done])
    if len(done) < 8:
        return float(so_far[-1] / at_s[-1])
    return float(np.polyfit(at_s, so_far, 1)[0])


def _fewest_threads(ways: list[Way]) -> Way:
    best = max(way.bytes_per_s for way in ways)
    good = [way for way in ways if way.bytes_per_s >= TOLERANCE * best]
    return min(good, key=lambda way: way.threads)


def _units(chunks: Sequence[Chunk], is_cold: bool) -> Iterator[Chunk]:
    """Yield what a read of the probe takes, again and again. Called under a lock."""
    for chunk in itertools.cycle(chunks):
        for start in range(chunk.start, chunk.end, UNIT_BYTES):
            end = min(start + UNIT_BYTES, chunk.end)
            if is_cold:
                chunk.file.reader.forget(start, end - start)
            yield Chunk(chunk.file, start, end)


def _read(
    units: Iterator[Chunk], mode: Mode, threads: int, seconds: float, max_bytes: int
) -> list[_Done]:
    """Read for some time and return what was done, at least a read per thread."""
    done: list[_Done] = []
    errors: list[OSError] = []
    lock = threading.Lock()
    started = time.perf_counter()

    def work() -> None:
        memory = _page_aligned(UNIT_BYTES)
        left = max(1, max_bytes // threads)
        while left > 0 and not errors:
            began = time.perf_counter()
            with lock:
                unit = next(units)
            num_bytes = unit.end - unit.start
            try:
                unit.file.reader.read([memory.part(0, num_bytes)], unit.start, mode == "direct")
            except OSError as error:
                errors.append(error)
                return
            ended = time.perf_counter()
            with lock:
                done.append(_Done(ended - started, ended - began, num_bytes))
            left -= num_bytes
            if ended - started > seconds:
                return

    workers = [threading.Thread(target=work, name="probe") for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return done


def _page_aligned(num_bytes: int) -> Buffer:
    memory = np.zeros(num_bytes + 4096, np.uint8)
    skip = -memory.ctypes.data % 4096
    part = memory[skip : skip + num_bytes]
    return Buffer(memoryview(part), part.ctypes.data)  # type: ignore[arg-type]
