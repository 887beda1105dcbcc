"""Queues of reads without a store: threads, exceptions at bad moments, and the end."""

import atexit
import ctypes
import gc
import os
import threading
import time
from array import array
from collections import deque
from functools import partial

import pytest

from moeyard.serving.experts.read_queue import ReadQueue
from moeyard.serving.experts.reading.native import library
from moeyard.serving.experts.reading.native import queue as native_queue
from moeyard.serving.experts.reading.native.queue import NativeQueue, _steps
from moeyard.serving.experts.reads import DroppedError, Read, Straight

from reading_paths import READ_AT, Piece

native = library.load()
needs_cpp = pytest.mark.skipif(native is None, reason="no C++ compiler")
WAIT_S = 10
NUM_BYTES = 512


def open_native(num_threads: int) -> NativeQueue:
    return NativeQueue(native, num_threads)


each_queue = pytest.mark.parametrize(
    "open_queue", [ReadQueue, pytest.param(open_native, marks=needs_cpp)]
)


def read_of(*parts, is_urgent=True) -> Read:
    return Read((0, 0), 0, is_urgent, deque(parts))


class Disk:
    """Reads in C++ of one chunk each, by a function of Python."""

    def __init__(self, read):
        self._function = READ_AT(read)
        native.read_with(ctypes.cast(self._function, ctypes.c_void_p))
        self._kept = []

    def read(self, offset: int, took=None) -> Read:
        """Return a read of bytes that begin here, all of them zero."""
        memory = ctypes.create_string_buffer(NUM_BYTES)
        chunks, segments = array("q", (0, -1, offset, 0, 1)), array("q", (0, 0, NUM_BYTES))
        addresses = array("Q", (ctypes.addressof(memory),))
        piece = Piece(ctypes.addressof(memory), NUM_BYTES)
        digest = native.hash(ctypes.addressof(piece), 1, NUM_BYTES)
        places = (chunks.buffer_info()[0], 1, segments.buffer_info()[0], 1)
        plan = native.plan(*places, digest)
        self._kept += [memory, addresses]
        straight = Straight(plan, addresses.buffer_info()[0], 1, NUM_BYTES, took)
        return Read((0, 0), 0, True, deque(), straight=straight)


@pytest.fixture
def disk():
    kept = []  # C++ keeps nothing alive

    def of(read):
        kept.append(Disk(read))
        return kept[-1]

    yield of
    native.read_with(None)


def interrupted(function, after: bool):
    """Return a function that Ctrl-C interrupts at its second call."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == 2 and not after:
            raise KeyboardInterrupt
        answer = function(*arguments)
        if len(calls) == 2 and after:
            raise KeyboardInterrupt
        return answer

    return call


@needs_cpp
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["collect", "mark"])
def test_an_interrupt_loses_no_read(where, after, monkeypatch):
    queue, reads = open_native(1), [read_of(lambda: None) for _ in range(3)]
    queue.submit(first := read_of(lambda: None))
    queue.wait_for_all([first])
    if where == "mark":
        monkeypatch.setattr(queue, "_end_read", interrupted(queue._end_read, after))
    else:
        collect = interrupted(native.collect, after)
        collect(queue._queue, *queue._places, native_queue.MOST_AT_ONCE)
        monkeypatch.setattr(native, "collect", collect)
    for read in reads:
        queue.submit(read)
    queue._library.close(queue._queue)
    with pytest.raises(KeyboardInterrupt):
        queue.look()
    looking = threading.Thread(target=queue.look, daemon=True)
    looking.start()
    looking.join(WAIT_S)
    assert not looking.is_alive() and all(read.is_done for read in reads) and not queue._reads


@needs_cpp
def test_a_dropped_read_that_another_thread_is_about_to_mark_has_ended(monkeypatch):
    queue, reached, hold = open_native(1), threading.Event(), threading.Event()
    mark = queue._end_read

    def slow(*arguments):
        reached.set()
        assert hold.wait(WAIT_S)
        mark(*arguments)

    monkeypatch.setattr(queue, "_end_read", slow)
    read = read_of(lambda: queue.drop(read), lambda: None, is_urgent=False)
    queue.submit(read)
    tickets = array("q", (read.ticket,))
    assert native.wait(queue._queue, tickets.buffer_info()[0], 1, 1, WAIT_S)
    metrics = threading.Thread(target=queue.look)
    metrics.start()
    assert reached.wait(WAIT_S)
    threading.Timer(0.02, hold.set).start()
    assert not queue.make_urgent(read)
    assert isinstance(read.error, DroppedError)
    metrics.join()


@pytest.fixture
def no_threads():
    """Return what makes the system refuse threads from now on."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "pthread_setattr_default_np"):
        pytest.skip("this C library cannot set what threads are like")
    before, huge = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    assert libc.pthread_getattr_default_np(before) == 0
    assert libc.pthread_attr_init(huge) == 0
    assert libc.pthread_attr_setstacksize(huge, ctypes.c_size_t(1 << 47)) == 0
    yield lambda: libc.pthread_setattr_default_np(huge)
    libc.pthread_setattr_default_np(before)


@pytest.fixture
def two_reads(disk, no_threads):
    """Return what makes a queue whose only thread is held in the first of two reads.

    Also returned: the reads, events that let each go on, events that say each has begun, and the
    threads that do them.
    """

    def make():
        goes_on, begun = ([threading.Event(), threading.Event()] for _ in range(2))
        readers = {}

        def read(descriptor, pieces, count, offset):
            readers[offset] = threading.get_native_id()
            begun[offset].set()
            assert goes_on[offset].wait(WAIT_S)
            return NUM_BYTES

        queue, some = open_native(2), disk(read)
        reads = [some.read(0), some.read(1)]
        queue.submit(reads[0])
        assert begun[0].wait(WAIT_S)
        assert no_threads() == 0
        queue.submit(reads[1])
        return queue, reads, goes_on, begun, readers

    return make


@needs_cpp
@pytest.mark.parametrize("is_small", [False, True], ids=["large", "small"])
def test_compute_does_small_reads_only(two_reads, monkeypatch, is_small):
    monkeypatch.setattr(native_queue, "SMALL_BYTES", NUM_BYTES - (not is_small))
    start = threading.Event()

    def let_go():
        assert start.wait(WAIT_S)
        time.sleep(0.02)
        goes_on[0].set()

    release = threading.Thread(target=let_go)
    release.start()  # before the system refuses threads
    queue, reads, goes_on, _, readers = two_reads()
    goes_on[1].set()
    start.set()
    queue.wait_for_all(reads)
    assert (readers[1] == threading.get_native_id()) == is_small
    release.join()
    queue.close()


@needs_cpp
def test_closing_waits_for_compute_that_reads(two_reads):
    ready = threading.Event()

    def compute():
        assert ready.wait(WAIT_S)
        queue.wait_for_all(reads)

    def close():
        assert ready.wait(WAIT_S) and begun[1].wait(WAIT_S)
        queue.close()

    threads = [threading.Thread(target=target) for target in (compute, close)]
    for thread in threads:  # before the system refuses threads
        thread.start()
    queue, reads, goes_on, begun, _ = two_reads()
    ready.set()
    assert begun[1].wait(WAIT_S), "compute reads: the thread is held"
    goes_on[0].set()
    threads[1].join(0.05)
    assert threads[1].is_alive()
    goes_on[1].set()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


@needs_cpp
def test_compute_may_use_a_queue_when_the_program_ends(monkeypatch):
    """What runs at the end stops the threads, and leaves the queue to those who are in it."""
    registered = []
    monkeypatch.setattr(atexit, "register", lambda call: registered.append(call) or call)
    queue = open_native(2)
    assert not queue._end.atexit
    registered[0]()
    queue.submit(read := read_of(lambda: None))
    queue.wait_for_all([read])
    assert "closed" in str(read.error)


@each_queue
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no way to let a thread wait")
def test_a_burst_uses_all_threads(open_queue):
    queue, together, cores = open_queue(4), threading.Barrier(4), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread, and of those it starts
    yields = partial(os.sched_setscheduler, 0, os.SCHED_IDLE, os.sched_param(0))
    queue.submit(first := read_of(yields))
    queue.wait_for_all([first])
    time.sleep(0.02)  # its thread is idle now, and does not run before this one waits
    reads = [read_of(partial(together.wait, WAIT_S)) for _ in range(4)]
    for read in reads:
        queue.submit(read)
    os.sched_setaffinity(0, cores)
    queue.wait_for_all(reads)
    assert [read.error for read in reads] == [None] * 4
    queue.close()


@each_queue
def test_without_threads_reads_end_and_with_one_it_does_all(open_queue, no_threads):
    queue, later = open_queue(4), open_queue(4)
    later.submit(first := read_of(lambda: None))
    later.wait_for_all([first])
    assert no_threads() == 0
    for is_urgent in (True, False):
        queue.submit(read := read_of(lambda: None, is_urgent=is_urgent))
        assert read.is_done and "allows no thread" in str(read.error)
    reads = [read_of(lambda: None) for _ in range(5)]
    for read in reads:
        later.submit(read)
    later.wait_for_all(reads)
    assert [read.error for read in reads] == [None] * 5
    queue.close()
    later.close()


@needs_cpp
def test_one_of_its_own_threads_may_free_a_queue():
    queue, ended = [open_native(2)], threading.Event()

    def free():
        queue.clear()
        gc.collect()
        ended.set()

    queue[0].submit(read_of(free))
    assert ended.wait(WAIT_S)
    for thread in threading.enumerate():
        if thread.name == "expert-reads-end":
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_a_read_that_c_hands_back_knows_what_is_left():
    read = Read((0, 0), 0, True, deque(), begin=lambda: [lambda: None] * 4)
    assert _steps({0: read})(0) == native_queue.MORE
    assert read.left == 0.75
