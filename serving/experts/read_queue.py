"""Reads of experts by a few threads: what compute waits for goes first.

A read consists of parts (chunks of an expert's bytes), done in order. Between the parts of an early
read a thread checks for urgent reads; if there are any, it puts the early read back and serves them
first. An early read that is no longer wanted ends at the next part.
"""

import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import Protocol

from .policies.policy import Key


@dataclass(slots=True, eq=False)
class Read:
    """One expert on its way into a slot."""

    key: Key
    slot: int
    is_urgent: bool
    parts: deque[Callable[[], None]]
    """What is still to be done, in this order."""
    is_prefetch: bool = False
    """True when it began early, urgent as it may have become."""
    is_dropped: bool = False
    """True when it is no longer wanted and ends, with an error, before its next part."""
    is_done: bool = False
    error: BaseException | None = None
    num_parts: int = 0
    """Parts at the start."""

    def __post_init__(self) -> None:
        self.num_parts = max(1, len(self.parts))


class DroppedError(Exception):
    """Ends a read that is no longer wanted."""


class Progress:
    """How fast reads go. The queue's threads change it under the queue's lock."""

    def __init__(self) -> None:
        self.reads = 0.0
        """Reads that were done so far; a part counts as its share."""
        self.busy_s = 0.0
        """Seconds in which at least one thread read."""
        self._active = 0
        self._since = 0.0

    def start(self) -> None:
        """Count a thread that begins to read."""
        if self._active == 0:
            self._since = time.perf_counter()
        self._active += 1

    def so_far(self) -> tuple[float, float]:
        """Return reads done and busy seconds until now."""
        running_s = time.perf_counter() - self._since if self._active else 0.0
        return self.reads, self.busy_s + running_s

    def stop(self, reads: float) -> None:
        """Count a thread that ends, and what it has read."""
        self.reads += reads
        self._active -= 1
        if self._active == 0:
            self.busy_s += time.perf_counter() - self._since


@dataclass(slots=True)
class _Waiting:
    urgent: deque[Read] = field(default_factory=deque)
    early: deque[Read] = field(default_factory=deque)

    def queue_of(self, read: Read) -> deque[Read]:
        return self.urgent if read.is_urgent else self.early

    def pop(self) -> Read | None:
        queue = self.urgent or self.early
        return queue.popleft() if queue else None


class Reads(Protocol):
    """What runs reads: threads, or a replay's clock."""

    def submit(self, read: Read) -> None:
        """Start a read as soon as possible."""
        ...

    def make_urgent(self, read: Read) -> bool:
        """Move an early read to the urgent ones; False if it was dropped and has ended."""
        ...

    def drop(self, read: Read) -> None:
        """Let a read that has begun end early, if it can; it may finish all the same."""
        ...

    def progress(self) -> tuple[float, float]:
        """Return how many reads were done so far, and in how many seconds of reading."""
        ...

    def cancel(self, read: Read) -> bool:
        """Take back a read that has not begun; say whether that was so."""
        ...

    def wait_for_any(self, reads: Collection[Read]) -> list[Read]:
        """Return those of ``reads`` that are done, once there is one."""
        ...

    def wait_for_all(self, reads: Collection[Read]) -> None:
        """Return when all of ``reads`` are done."""
        ...

    def close(self) -> None:
        """Stop. Reads that have not begun fail."""
        ...


class ReadQueue:
    """Runs reads in a bounded pool of threads. One thread calls its methods; any may close it."""

    def __init__(self, num_threads: int, at_end: Callable[[], None] | None = None) -> None:
        """``at_end`` is called when the threads have stopped."""
        self._at_end = at_end
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="expert-read")
        self._waiting = _Waiting()
        self._changed = Condition()
        self._is_closed = False
        self._progress = Progress()

    def submit(self, read: Read) -> None:
        """Start a read as soon as a thread is free."""
        with self._changed:
            if self._is_closed:
                self._drop(read)
                return
            self._waiting.queue_of(read).append(read)
            self._pool.submit(self._run_next)

    def make_urgent(self, read: Read) -> bool:
        """Move an early read to the urgent ones; one that runs is no longer interrupted.

        One that was dropped goes on, unless it has ended already: then the answer is False.
        """
        with self._changed:
            if read.is_done and isinstance(read.error, DroppedError):
                return False
            read.is_dropped = False
            was_waiting = read in self._waiting.early
            if was_waiting:
                self._waiting.early.remove(read)
            read.is_urgent = True
            if was_waiting:
                self._waiting.urgent.append(read)
            return True

    def drop(self, read: Read) -> None:
        """Let a read that runs end before its next part; :meth:`cancel` takes back others."""
        with self._changed:
            read.is_dropped = True

    def progress(self) -> tuple[float, float]:
        """Return how many reads were done so far, and in how many seconds of reading."""
        with self._changed:
            return self._progress.so_far()

    def cancel(self, read: Read) -> bool:
        """Take back a read that no thread is working on; say whether that was so."""
        with self._changed:
            queue = self._waiting.queue_of(read)
            if read not in queue:
                return False
            queue.remove(read)
            return True

    def wait_for_any(self, reads: Collection[Read]) -> list[Read]:
        """Return those of ``reads`` that are done, once there is one."""
        with self._changed:
            self._changed.wait_for(lambda: any(read.is_done for read in reads))
            return [read for read in reads if read.is_done]

    def wait_for_all(self, reads: Collection[Read]) -> None:
        """Return when all of ``reads`` are done."""
        with self._changed:
            self._changed.wait_for(lambda: all(read.is_done for read in reads))

    def close(self) -> None:
        """Stop the threads. Reads that have not begun fail, so that waiting callers return."""
        with self._changed:
            self._is_closed = True
            for read in (*self._waiting.urgent, *self._waiting.early):
                self._drop(read)
            self._waiting = _Waiting()
            self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._at_end is not None:
            self._at_end()

    def _run_next(self) -> None:
        """Do one waiting read, or as much of it as may be done; every submit calls this once."""
        with self._changed:
            read = self._waiting.pop()
            if read is None:
                return  # it was cancelled
            self._progress.start()
        before = len(read.parts)
        try:
            while read.parts:
                read.parts[0]()
                read.parts.popleft()
                if self._is_laid_aside(read, before):
                    return
        except BaseException as error:
            read.error = error
        with self._changed:
            self._progress.stop((before - len(read.parts)) / read.num_parts)
            read.is_done = True
            self._changed.notify_all()

    def _is_laid_aside(self, read: Read, before: int) -> bool:
        """Put an early read back to the front when something urgent waits.

        ``before`` are the parts that were left when this thread began. Raises
        :class:`DroppedError` if the read is no longer wanted.
        """
        with self._changed:
            if read.is_dropped and read.parts:
                raise DroppedError
            if read.is_urgent or not read.parts or not self._waiting.urgent or self._is_closed:
                return False
            self._waiting.early.appendleft(read)
            self._progress.stop((before - len(read.parts)) / read.num_parts)
            self._pool.submit(self._run_next)
            return True

    @staticmethod
    def _drop(read: Read) -> None:
        read.error, read.is_done = OSError("the expert store is closed"), True
