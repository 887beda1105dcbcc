"""The C++ queue of reads behind the interface of ``reads.py``."""

import atexit
import ctypes
import os
import threading
import weakref
from array import array
from collections.abc import Callable, Collection
from functools import partial

from ...reads import NO_THREAD, DroppedError, Read
from .library import CallerStep, Library

LOOK_UP_S = 0.2
"""Compute looks up from waiting so often: Python handles signals only then."""
MOST_AT_ONCE = 64
"""Reads that are handed over by one call."""
SMALL_BYTES = 1 << 20
"""An expert up to this size is read and computed in less time than it takes to begin either; larger
ones are left to the threads, so that compute goes on with the first that is there."""
MORE, FINISHED, FAILED = range(3)
"""``Step`` of queue.h."""
READ, ERROR, DROPPED, CLOSED = range(4)
"""``Outcome`` of queue.h."""


class NativeQueue:
    """Runs reads in threads of C++: those with a plan without Python, others by their parts.

    A read whose plan fails goes on in Python, from its beginning: there it is tried again, and its
    error gets words. One thread calls its methods; any may close it.
    """

    def __init__(
        self, library: Library, num_threads: int, at_end: Callable[[], None] | None = None
    ) -> None:
        """``at_end`` is called when the threads have stopped."""
        self._library, self._at_end = library, at_end
        self._reads: dict[int, Read] = {}
        """By ticket, until they are done."""
        self._step = CallerStep(_steps(self._reads))  # C++ keeps no count of who uses it
        queue = library.open(num_threads, SMALL_BYTES, self._step)
        if queue is None:
            raise MemoryError
        self._queue = queue
        self._counts = (ctypes.c_int64 * 2).from_address(library.counts(self._queue))
        """Reads that have ended, and those of them that C++ has handed out (``Counts``)."""
        self._num_marked = self._next_ticket = 0
        self._looking = threading.Lock()
        self._tickets, self._outcomes = (array("q", bytes(8 * MOST_AT_ONCE)) for _ in range(2))
        self._seconds = array("d", bytes(8 * MOST_AT_ONCE))
        self._places = (
            self._tickets.buffer_info()[0],
            self._outcomes.buffer_info()[0],
            self._seconds.buffer_info()[0],
        )
        # Its threads call Python, so they must end before Python does. The queue itself stays then:
        # compute may be a daemon thread, and in it.
        known = (library, self._queue)
        stop = atexit.register(partial(_stop, *known, os.getpid()))
        self._end = weakref.finalize(self, _free, *known, self._step, os.getpid(), stop)
        self._end.atexit = False

    def submit(self, read: Read) -> None:
        """Start a read as soon as a thread is free."""
        ticket = read.ticket = self._next_ticket
        self._next_ticket += 1
        self._reads[ticket] = read
        steps: tuple[int | None, int | None, int] = (None, None, read.num_parts)
        if read.straight is not None:
            steps = (read.straight.plan, read.straight.addresses, read.straight.num_chunks)
        if not self._library.submit(self._queue, ticket, *steps, read.is_urgent):
            del self._reads[ticket]
            read.error, read.is_done = OSError(NO_THREAD), True

    def make_urgent(self, read: Read) -> bool:
        """Move an early read to the urgent ones; one that runs is no longer interrupted.

        One that was dropped goes on, unless it has ended already: then the answer is False, and no
        thread uses its slot any more.
        """
        if not read.is_done:
            read.is_dropped, read.is_urgent = False, True
            if self._library.make_urgent(self._queue, read.ticket):
                return True
            self.look()
        return not isinstance(read.error, DroppedError)

    def drop(self, read: Read) -> None:
        """Let a read that runs end before its next part; :meth:`cancel` takes back others."""
        read.is_dropped = True
        self._library.drop(self._queue, read.ticket)

    def progress(self) -> tuple[float, float]:
        """Return how many reads were done so far, and in how many seconds of reading."""
        found = array("d", (0.0, 0.0))
        self._library.progress(self._queue, found.buffer_info()[0])
        return found[0], found[1]

    def cancel(self, read: Read) -> bool:
        """Take back a read that no thread is working on; say whether that was so."""
        if read.is_done or not self._library.cancel(self._queue, read.ticket):
            return False
        del self._reads[read.ticket]
        return True

    def look(self) -> None:
        """Mark the reads that are done; any thread may call it."""
        while self._counts[0] > self._num_marked:
            with self._looking:
                self._mark()

    def wait_for_any(self, reads: Collection[Read]) -> list[Read]:
        """Return those of ``reads`` that are done, once there is one.

        Small ones that compute needs are waited for together: going on with each of them costs more
        than it gains.
        """
        are_small = all(read.is_urgent and is_small(read) for read in reads)
        self._wait(reads, len(reads) if are_small else 1)
        return [read for read in reads if read.is_done]

    def wait_for_all(self, reads: Collection[Read]) -> None:
        """Return when all of ``reads`` are done."""
        self._wait(reads, len(reads))

    def close(self) -> None:
        """Stop the threads. Reads that have not begun fail, so that waiting callers return."""
        self._library.close(self._queue)
        if self._at_end is not None:
            self._at_end()

    def _wait(self, reads: Collection[Read], wanted: int) -> None:
        self.look()
        missing = [read.ticket for read in reads if not read.is_done]
        wanted -= len(reads) - len(missing)
        if wanted <= 0:
            return
        tickets = array("q", missing)  # named, so that it lives as long as its address is used
        arguments = (self._queue, tickets.buffer_info()[0], len(tickets), wanted, LOOK_UP_S)
        while not self._library.wait(*arguments):
            pass
        self.look()

    def _mark(self) -> None:
        """Mark what C++ hands out. An exception, of Ctrl-C for one, may come between any two lines:
        then the next call goes on here.
        """
        if self._counts[1] == self._num_marked:
            self._library.collect(self._queue, *self._places, MOST_AT_ONCE)
        while self._counts[1] > self._num_marked:
            place = self._num_marked % MOST_AT_ONCE
            read = self._reads.get(self._tickets[place])
            if read is not None:
                self._end_read(read, place)
                self._reads.pop(self._tickets[place])
            self._num_marked += 1  # last: until then other threads wait in look

    def _end_read(self, read: Read, place: int) -> None:
        outcome = self._outcomes[place]
        if outcome == DROPPED:
            read.error = DroppedError()
        elif outcome == CLOSED:
            read.error = OSError("the expert store is closed")
        elif read.straight is not None and read.straight.took is not None:
            seconds, self._seconds[place] = self._seconds[place], 0.0  # said once
            if seconds > 0:  # else Python has read, and said so
                read.straight.took(seconds)
        read.is_done = True


def is_small(read: Read) -> bool:
    """Say whether C++ reads the expert, and reads it in about no time."""
    return read.straight is not None and read.straight.num_bytes <= SMALL_BYTES


def _steps(reads: dict[int, Read]) -> Callable[[int], int]:
    """Return what does the next part of a read; knows no queue, which may be gone."""

    def step(ticket: int) -> int:
        read = reads[ticket]
        try:
            if read.begin is not None:
                read.take(read.begin())
                read.begin = None
            if read.parts:
                read.parts[0]()
                read.parts.popleft()
        except BaseException as error:
            read.error = error
            return FAILED
        return MORE if read.parts else FINISHED

    return step


def _stop(library: Library, queue: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has none of the threads
        library.close(queue)


def _free(
    library: Library, queue: int, step: object, process: int, stop: Callable[[], None]
) -> None:
    """Stop the threads and free the queue; ``step``, and what reads use, lives until then."""
    atexit.unregister(stop)
    if os.getpid() != process:
        return
    if library.close(queue):
        library.free(queue)
        return
    arguments = (library, queue, step, process, stop)  # one of its threads cannot wait for itself
    threading.Thread(target=_free, args=arguments, name="expert-reads-end").start()
