"""Run an engine in its own thread and hand its events to asyncio.

All events of a step cross to the event loop in one call, but for those that an outlet takes
(reader.py). A reader that comes late takes everything that waits for it at once.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from ...errors import RequestError
from .engine import Engine
from .reader import Delivery, Indexed, Outlet, Reader, hand_over
from .sequence import GenerationEvent, GenerationRequest

log = logging.getLogger(__name__)

STUCK_AFTER_S = 120.0
"""A single engine step that takes longer makes the server unhealthy."""
RETRY_AFTER_S = 10
"""``Retry-After`` of an engine that does not work: its replica is being replaced."""


@dataclass(frozen=True, slots=True)
class _Add:
    requests: Sequence[GenerationRequest]
    reader: Reader


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class _Exchange:
    version: int
    swap: Callable[[], None]
    done: "Future[None]"


class EngineThread:
    """The engine's thread, alive until ``stop``."""

    def __init__(self, engine: Engine, stuck_after_s: float = STUCK_AFTER_S) -> None:
        self.engine = engine
        self._stuck_after_s = stuck_after_s
        self._commands: queue.SimpleQueue[_Add | _Cancel | _Exchange | None] = queue.SimpleQueue()
        self._readers: dict[str, tuple[Reader, int]] = {}
        """By request, with its index among those that were put together."""
        self._step_started: float | None = None
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """Return why the engine does not work, or None."""
        if self._failure is not None:
            return self._failure
        if not self._thread.is_alive():
            return "the engine has stopped"
        started = self._step_started
        duration_s = 0.0 if started is None else time.monotonic() - started
        if duration_s > self._stuck_after_s:
            return f"the engine has been in one step for {duration_s:.0f} s"
        return None

    async def generate(
        self, requests: Sequence[GenerationRequest], outlet: Outlet | None = None
    ) -> AsyncGenerator[list[Indexed]]:
        """Run requests together; yield their events as they come, all that wait in one list.

        ``outlet`` may take all but the last event of each request. Leaving the iteration early
        cancels what has not ended, and the outlet gets nothing more. A request that the engine
        does not take ends with an error event.
        """
        reader = Reader(outlet)
        self._commands.put(_Add(requests, reader))
        unfinished = {request.request_id for request in requests}
        try:
            # Checked after queueing: an engine that ended before would never answer.
            problem = self.problem()
            if problem is not None:
                raise _unavailable(f"{problem}; try again later.")
            while unfinished:
                events = await reader.take()
                for _, event in events:
                    if event.finish_reason is not None:
                        unfinished.discard(event.request_id)
                yield events
        finally:
            reader.close_outlet()
            if unfinished:
                self._commands.put(_Cancel(list(unfinished)))

    def exchange_weights(self, version: int, swap: Callable[[], None]) -> "Future[None]":
        """Let the engine call ``swap`` between two steps; see :meth:`Engine.exchange_weights`.

        The future is cancelled if the engine ends before.
        """
        done: Future[None] = Future()
        self._commands.put(_Exchange(version, swap, done))
        if self.problem() is not None and not self._thread.is_alive():
            done.cancel()
        return done

    def stop(self) -> None:
        """End the thread after the step it is in."""
        self._commands.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._step_started = time.monotonic()
                events = self.engine.step()
                self._step_started = None
                self._deliver(events)
            self._failure = "the server is shutting down"
        except BaseException as error:  # a native library's panic is not an Exception
            log.exception("the engine failed")
            self._failure = f"the engine failed ({type(error).__name__}); see the server's log"
        finally:
            # In any case, no client may wait for ever.
            self._fail_all(self._failure or "the engine has stopped")

    def _take_commands(self) -> bool:
        """Handle what has come in, waiting when there is nothing else to do."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, _Cancel):
                for request_id in command.request_ids:
                    self._readers.pop(request_id, None)
                    self.engine.cancel(request_id)
            elif isinstance(command, _Exchange):
                self._exchange(command)
            else:
                self._add(command)

    def _exchange(self, command: _Exchange) -> None:
        try:
            self.engine.exchange_weights(command.version, command.swap)
        except BaseException as error:
            command.done.set_exception(error)
            raise  # half of the weights may be new
        command.done.set_result(None)

    def _add(self, command: _Add) -> None:
        refused = []
        self._listen(command)
        for request in command.requests:
            try:
                self.engine.add(request)
            except RequestError as error:
                refused.append(GenerationEvent(request.request_id, "", 0, "error", error))
        self._deliver(refused)

    def _listen(self, command: _Add) -> None:
        for index, request in enumerate(command.requests):
            self._readers[request.request_id] = (command.reader, index)

    def _deliver(self, events: Iterable[GenerationEvent]) -> None:
        """Give events to outlets, and the others to their event loops, in one call for each."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        outlets: list[Outlet] = []
        for event in events:
            found = self._readers.get(event.request_id)
            if event.finish_reason is not None:
                self._readers.pop(event.request_id, None)
            if found is None:
                continue
            reader, index = found
            outlet = reader.offer(index, event)
            if outlet is not None:
                outlets.append(outlet)
            else:
                by_loop.setdefault(reader.loop, []).append((reader, index, event))
        for outlet in outlets:
            outlet.flush()
        for loop, deliveries in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(hand_over, deliveries)

    def _fail_all(self, message: str) -> None:
        """End every request, also those that the engine has not taken yet."""
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                self._listen(command)
            elif isinstance(command, _Exchange):
                command.done.cancel()
        self._deliver(
            [
                GenerationEvent(request_id, "", 0, "error", _unavailable(message))
                for request_id in self._readers
            ]
        )


def _unavailable(message: str) -> RequestError:
    return RequestError(message, code="unavailable", status=503, retry_after_s=RETRY_AFTER_S)
