"""How far this process is, for the thread that tells the other ranks.

A thread that beats proves that its process runs, and not that the main thread gets anywhere. So a
beat also says how often the main thread has moved: what it notes here, or processor time it used.
Hashing and tokenising move without knowing of this page; what waits by nature notes each turn.
"""

import threading
import time

MOVE_S = 0.05
"""Processor time of the main thread that counts as a move. Who waits on a condition or semaphore
uses less than a hundredth of that in a second."""


class Pulse:
    """What the main thread does, and how often it has moved."""

    def __init__(self) -> None:
        self._doing = "at the start"
        self._notes = self._moves = 0
        self._seen_notes, self._seen_cpu_s = 0, 0.0

    @property
    def doing(self) -> str:
        """Words such as "in step 3"."""
        return self._doing

    def begin(self, doing: str) -> None:
        """Note what the main thread does now."""
        self._doing = doing
        self._notes += 1

    def note(self) -> None:
        """Note that the main thread moves."""
        self._notes += 1

    def moves(self) -> int:
        """Return a count that rises while the main thread moves; for one other thread."""
        cpu_s = _main_thread_cpu_s()
        if self._notes != self._seen_notes or cpu_s - self._seen_cpu_s > MOVE_S:
            self._seen_notes, self._seen_cpu_s = self._notes, cpu_s
            self._moves += 1
        return self._moves


def _main_thread_cpu_s() -> float:
    if not hasattr(time, "pthread_getcpuclockid"):  # not on macOS
        return time.process_time()
    identity = threading.main_thread().ident
    assert identity is not None
    return time.clock_gettime(time.pthread_getcpuclockid(identity))


pulse = Pulse()
"""Of this process: it has one main thread."""
