"""Reads of experts by a few threads: what compute waits for goes first.

A read consists of parts (chunks of an expert's bytes), done in order. Between the parts of an early
read a thread checks for urgent reads; if there are any, it puts the early read back and serves them
first. An early read that is no longer wanted ends at the next part.
"""

import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread

from .reads import NO_THREAD, DroppedError, Read


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

    def pop(self, takes_early: bool) -> Read | None:
        queue = self.urgent or (self.early if takes_early else None)
        return queue.popleft() if queue else None


class ReadQueue:
    """Runs reads in a few threads. One thread calls its methods; any may close it.

    At most half of the threads do early reads, so an urgent one finds another that is free.
    """

    def __init__(self, num_threads: int, at_end: Callable[[], None] | None = None) -> None:
        """``at_end`` is called when the threads have stopped."""
        self._at_end = at_end
        self._num_threads = num_threads
        self._most_early = max(1, num_threads // 2)
        self._threads: list[Thread] = []
        """Started as they are needed. A thread that is done takes the next read by itself: waking
        another one costs compute more than handing the read on."""
        lock = Lock()
        self._has_work, self._changed = Condition(lock), Condition(lock)
        self._waiting = _Waiting()
        self._num_idle = self._num_early = 0
        self._is_closed = False
        self._progress = Progress()

    def submit(self, read: Read) -> None:
        """Start a read as soon as a thread is free."""
        with self._changed:
            if self._is_closed:
                self._drop(read)
                return
            queue = self._waiting.queue_of(read)
            queue.append(read)
            may_run = read.is_urgent or self._num_early < self._most_early
            if may_run and not self._wake():
                queue.remove(read)
                self._drop(read, NO_THREAD)

    def make_urgent(self, read: Read) -> bool:
        """Move an early read to the urgent ones; one that runs is no longer interrupted.

        One that was dropped goes on, unless it has ended already: then the answer is False, and no
        thread uses its slot any more.
        """
        with self._changed:
            if isinstance(read.error, DroppedError):
                return False
            read.is_dropped = False
            was_waiting = read in self._waiting.early
            if was_waiting:
                self._waiting.early.remove(read)
            read.is_urgent = True
            if was_waiting:
                self._waiting.urgent.append(read)
                self._wake()
            return True

    def drop(self, read: Read) -> None:
        """Let a read that runs end before its next part; :meth:`cancel` takes back others."""
        with self._changed:
            read.is_dropped = True

    def look(self) -> None:
        """Do nothing: the threads mark reads."""

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
            self._has_work.notify_all()
        for thread in self._threads:
            thread.join()
        if self._at_end is not None:
            self._at_end()

    def _wake(self) -> bool:
        """Let one more thread look for work; False if there is none, and none can be started."""
        room = max(0, self._most_early - self._num_early)
        wanted = len(self._waiting.urgent) + min(len(self._waiting.early), room)
        # A thread that was woken counts as idle until it runs.
        if wanted > self._num_idle and len(self._threads) < self._num_threads and self._start():
            return True
        self._has_work.notify()
        return bool(self._threads)

    def _start(self) -> bool:
        name = f"expert-read-{len(self._threads)}"
        thread = Thread(target=self._run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False  # the system allows no more
        self._threads.append(thread)
        return True

    def _run(self) -> None:
        """Do reads, one after the other, until the queue is closed."""
        while True:
            with self._has_work:
                while (read := self._waiting.pop(self._num_early < self._most_early)) is None:
                    if self._is_closed:
                        return
                    self._num_idle += 1
                    self._has_work.wait()
                    self._num_idle -= 1
                counts_as_early = not read.is_urgent
                self._num_early += counts_as_early
                self._progress.start()
            before, is_done = len(read.parts), self._do(read)
            with self._changed:
                self._num_early -= counts_as_early
                self._progress.stop((before - len(read.parts)) / read.num_parts)
                read.is_done = is_done
                if is_done:
                    self._changed.notify_all()
                elif self._is_closed:
                    self._drop(read)
                    self._changed.notify_all()
                else:  # it may have become urgent since its last part
                    self._waiting.queue_of(read).appendleft(read)

    def _do(self, read: Read) -> bool:
        """Do a read and say whether it is done; False = what is left must wait."""
        try:
            while read.parts:
                read.parts[0]()
                read.parts.popleft()
                if self._must_wait(read):
                    return False
        except BaseException as error:
            read.error = error
        return True

    def _must_wait(self, read: Read) -> bool:
        """Say whether an early read must let urgent ones go first.

        Raises :class:`DroppedError` if it is no longer wanted.
        """
        if read.is_urgent or not read.parts:
            return False
        with self._changed:
            if read.is_dropped:
                read.error = DroppedError()  # under the lock: make_urgent looks at it
                raise read.error
            return not read.is_urgent and bool(self._waiting.urgent) and not self._is_closed

    @staticmethod
    def _drop(read: Read, why: str = "the expert store is closed") -> None:
        read.error, read.is_done = OSError(why), True
