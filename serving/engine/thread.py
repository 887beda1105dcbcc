"""Run an engine in its own thread and hand its events to asyncio."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ...errors import RequestError
from .engine import Engine
from .sequence import GenerationEvent, GenerationRequest

log = logging.getLogger(__name__)

STUCK_AFTER_S = 120.0
"""A single engine step that takes longer makes the server unhealthy."""
RETRY_AFTER_S = 10
"""``Retry-After`` of an engine that does not work: its replica is being replaced."""


@dataclass(frozen=True, slots=True)
class _Add:
    request: GenerationRequest
    listener: "_Listener"


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


class _Listener:
    """Where one request's events go: a queue of the event loop that waits for them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[GenerationEvent] = asyncio.Queue()

    def put(self, event: GenerationEvent) -> None:
        """Hand an event over from the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self) -> GenerationEvent:
        """Wait for the next event."""
        return await self._queue.get()


class EngineThread:
    """The engine's thread, alive until ``stop``."""

    def __init__(self, engine: Engine, stuck_after_s: float = STUCK_AFTER_S) -> None:
        self.engine = engine
        self._stuck_after_s = stuck_after_s
        self._commands: queue.Queue[_Add | _Cancel | None] = queue.Queue()
        self._listeners: dict[str, _Listener] = {}
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

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Yield the request's events; leaving the iteration early cancels the request."""
        self.engine.check(request)
        listener = _Listener()
        self._commands.put(_Add(request, listener))
        is_finished = False
        try:
            # Checked after queueing: an engine that ended before would never answer.
            problem = self.problem()
            if problem is not None:
                raise _unavailable(f"{problem}; try again later.")
            while not is_finished:
                event = await listener.get()
                is_finished = event.finish_reason is not None
                yield event
        finally:
            if not is_finished:
                self._commands.put(_Cancel(request.request_id))

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
                for event in events:
                    self._deliver(event)
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
                self._listeners.pop(command.request_id, None)
                self.engine.cancel(command.request_id)
                continue
            self._listeners[command.request.request_id] = command.listener
            try:
                self.engine.add(command.request)
            except RequestError as error:
                request_id = command.request.request_id
                self._deliver(GenerationEvent(request_id, "", 0, "error", error))

    def _deliver(self, event: GenerationEvent) -> None:
        listener = self._listeners.get(event.request_id)
        if event.finish_reason is not None:
            self._listeners.pop(event.request_id, None)
        if listener is not None:
            listener.put(event)

    def _fail_all(self, message: str) -> None:
        """End every request, also those that the engine has not taken yet."""
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                self._listeners[command.request.request_id] = command.listener
        for request_id in list(self._listeners):
            self._deliver(GenerationEvent(request_id, "", 0, "error", _unavailable(message)))


def _unavailable(message: str) -> RequestError:
    return RequestError(message, code="unavailable", status=503, retry_after_s=RETRY_AFTER_S)
