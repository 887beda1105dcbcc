"""A thread that runs calls one after the other, like a stream of CUDA."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")
Found = TypeVar("Found", covariant=True)


class Pending(Protocol[Found]):
    """What a lane returns: the result of a call, perhaps not yet there."""

    def result(self) -> Found:
        """Return the result when it is there."""

    def done(self) -> bool:
        """Say whether it is there."""


class Lane:
    """Runs calls in the order in which they are submitted, next to the thread that submits them.

    The thread is a daemon: a collective that waits for a lost rank does not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self.idle_s = 0.0
        """How long the thread has waited for calls, and in :meth:`wait`; for calls to read."""
        threading.Thread(target=self._run, name=f"moeyard-{name}", daemon=True).start()

    def submit(self, call: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Run a call after all earlier ones; its result or error is in the future."""
        future: Future[Result] = Future()
        self._calls.put((future, partial(call, *arguments)))
        return future

    def run(self, call: Callable[[], Result]) -> Result:
        """Return the result of ``call``, which runs after all earlier ones."""
        return self.submit(call).result()

    def wait(self, future: Pending[Result]) -> Result:
        """Return the result of another lane's future, to a call in this one."""
        began = time.perf_counter()
        try:
            return future.result()
        finally:
            self.idle_s += time.perf_counter() - began

    def _run(self) -> None:
        while True:
            began = time.perf_counter()
            future, call = self._calls.get()
            self.idle_s += time.perf_counter() - began
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call  # keep no tensors while waiting


class DirectLane:
    """Runs each call at once, in the thread that submits it: for calls that overlap with nothing.

    They need no hand-over to a thread and back, which costs most where ranks share cores.
    """

    def submit(self, call: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Return the result of a call, which has run."""
        future: Future[Result] = Future()
        future.set_result(call(*arguments))
        return future

    def wait(self, future: Pending[Result]) -> Result:
        """Return the result of a future that is done."""
        return future.result()
