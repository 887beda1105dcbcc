"""Rank 0's thread that reads a data set ahead of training."""

import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from ...errors import DataError, Stopped
from ...parallel.watch.pulse import pulse
from ..stop import StopRequest
from .blocks import Blocks
from .token_stream import StreamPosition, TokenStream

LINE_EVERY_S = 5

OpenStream = Callable[[StreamPosition, Callable[[float], object]], TokenStream]
"""Opens the stream at a position; pauses between attempts go through the second argument."""


class BlockWriter:
    """Writes blocks in a thread, at most ``ahead`` beyond the one that training reads.

    A thread is enough: reading files and tokenising take the time, and those libraries release the
    interpreter lock. A thread also dies with its process, whatever kills that.
    """

    def __init__(
        self, blocks: Blocks, open_stream: OpenStream, ahead: int, stop: StopRequest
    ) -> None:
        self._blocks, self._open_stream = blocks, open_stream
        self._ahead, self._stop = ahead, stop
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._needed = self._wanted = self._next = 0
        """First block that training still needs, last one it waits for, next one to write."""
        self._error: Exception | None = None

    def wait(self, first: int, last: int) -> None:
        """Return when blocks ``first`` to ``last`` are written; earlier ones are not needed again.

        Raises the error that ended the reading, or :class:`Stopped` after a stop request.
        """
        started = shown = time.monotonic()
        if self._thread is None:
            self._start(first)
        with self._changed:
            self._needed, self._wanted = first, last
            self._changed.notify_all()
            while self._next <= last:
                if self._error is not None:
                    raise self._error
                if self._stop.signal_name is not None:
                    raise Stopped(f"stopped by {self._stop.signal_name} while waiting for data.")
                pulse.note()  # other ranks must not give up while the hub is silent
                self._changed.wait(0.2)
                if time.monotonic() - shown > LINE_EVERY_S:
                    shown = time.monotonic()
                    waited = f"block={last} seconds={shown - started:.0f}"
                    sys.stderr.write(f"event=waiting_for_data {waited}\n")

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def _start(self, first: int) -> None:
        """Continue after the whole blocks; make damaged ones again."""
        self._needed = first
        self._next, start = self._blocks.end_before(self._blocks.whole_from(first))
        self._blocks.forget_from(self._next)
        self._thread = threading.Thread(target=self._run, args=(start,), daemon=True)
        self._thread.start()

    def _run(self, start: StreamPosition) -> None:
        try:
            stream = self._open_stream(start, self._closing.wait)
            try:
                while self._may_write():
                    tokens = stream.take(self._blocks.num_tokens)
                    end = stream.position
                    if self._next >= self._needed:
                        self._blocks.write(self._next, np.append(tokens, stream.peek()), end)
                    with self._changed:
                        self._next += 1
                        self._changed.notify_all()
            finally:
                stream.close()
        except Exception as error:  # raised where training waits, with its traceback
            self._fail(error)
        except BaseException as error:  # a panic in a Rust library is not an Exception
            self._fail(DataError(f"reading the data ended with {type(error).__name__}: {error}"))

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _may_write(self) -> bool:
        """Wait until the next block is wanted; return False when there will be no more."""
        with self._changed:
            while self._next > self._wanted + self._ahead and not self._closing.is_set():
                self._changed.wait()
            return not self._closing.is_set()
