"""This process's progress, for the thread that reports it to the other ranks.

A beat proves that a process runs, not that its main thread makes progress. So a beat also says how
often the main thread has moved. A move is a note made here, or processor time used. Hashing and
tokenising use processor time and need no notes. Code that waits by nature notes each turn.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MOVE_S = 0.05
"""Processor time of the main thread that counts as a move. A thread that waits on a condition or
semaphore uses less than a hundredth of that per second."""


class Pulse:
    """What the main thread does, and how often it has moved."""

    def __init__(self) -> None:
        self._doing = "at the start"
        self._notes = self._moves = 0
        self._seen_notes, self._seen_cpu_s = 0, 0.0
        self._collectives: list[str] = []

    @property
    def doing(self) -> str:
        """Words such as "in step 3"."""
        return self._doing

    @property
    def collective(self) -> str | None:
        """The collective that this process is in, such as "the all-to-all of rows"; the oldest of
        several, which run in different threads."""
        return next(iter(self._collectives), None)

    @contextmanager
    def in_collective(self, name: str) -> Iterator[None]:
        """Note that this thread takes part in a collective, and may wait there for other ranks."""
        self._collectives.append(name)
        yield
        self._collectives.remove(name)  # not after an error: that names it

    def begin(self, doing: str) -> None:
        """Note what the main thread does now."""
        self._doing = doing
        self._notes += 1

    def note(self) -> None:
        """Note that the main thread moves."""
        self._notes += 1

    def moves(self) -> int:
        """Return a count that rises while the main thread moves. Only one thread may call this."""
        cpu_s = _main_thread_cpu_s()
        if self._notes != self._seen_notes or cpu_s - self._seen_cpu_s > MOVE_S:
            self._seen_notes, self._seen_cpu_s = self._notes, cpu_s
            self._moves += 1
        return self._moves


def _main_thread_cpu_s() -> float:
    identity = threading.main_thread().ident
    assert identity is not None
    return thread_cpu_s(identity)


def thread_cpu_s(identity: int) -> float:
    """Return the processor time of a living thread, or that of the process on macOS."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time()
    return time.clock_gettime(time.pthread_getcpuclockid(identity))


pulse = Pulse()
"""The pulse of this process, which has one main thread."""
