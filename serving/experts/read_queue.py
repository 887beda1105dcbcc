"""Reads of experts by a few threads: what compute waits for goes first.

A read consists of parts (chunks of an expert's bytes), done in order. Between the parts of an early
read a thread checks for urgent reads; if there are any, it puts the early read back and serves them
first.
"""

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
    is_done: bool = False
    error: BaseException | None = None


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

    def make_urgent(self, read: Read) -> None:
        """Move an early read to the urgent ones."""
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

    def submit(self, read: Read) -> None:
        """Start a read as soon as a thread is free."""
        with self._changed:
            if self._is_closed:
                self._drop(read)
                return
            self._waiting.queue_of(read).append(read)
            self._pool.submit(self._run_next)

    def make_urgent(self, read: Read) -> None:
        """Move an early read to the urgent ones; one that runs is no longer interrupted."""
        with self._changed:
            was_waiting = read in self._waiting.early
            if was_waiting:
                self._waiting.early.remove(read)
            read.is_urgent = True
            if was_waiting:
                self._waiting.urgent.append(read)

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
        try:
            while read.parts:
                read.parts[0]()
                read.parts.popleft()
                if self._is_laid_aside(read):
                    return
        except BaseException as error:
            read.error = error
        with self._changed:
            read.is_done = True
            self._changed.notify_all()

    def _is_laid_aside(self, read: Read) -> bool:
        """Put an early read back to the front when something urgent waits."""
        with self._changed:
            if read.is_urgent or not read.parts or not self._waiting.urgent or self._is_closed:
                return False
            self._waiting.early.appendleft(read)
            self._pool.submit(self._run_next)
            return True

    @staticmethod
    def _drop(read: Read) -> None:
        read.error, read.is_done = OSError("the expert store is closed"), True
