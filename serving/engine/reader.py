"""Where the events of requests that were put together go: to one task of an event loop.

What comes while an answer goes on may go to an :class:`Outlet` instead, in the engine's thread.
Then the event loop sleeps until an answer ends. Each time that it wakes, it takes the interpreter
away from the engine.
"""

import asyncio
import threading
from typing import Protocol

from .sequence import GenerationEvent

Indexed = tuple[int, GenerationEvent]
"""An event, and which of the requests it belongs to that were put together."""


class Outlet(Protocol):
    """Takes events in the engine's thread. Its methods neither wait nor raise."""

    def take(self, index: int, event: GenerationEvent) -> bool:
        """Take an event that ends nothing; False sends it to the event loop."""
        ...

    def flush(self) -> None:
        """Send on what was taken; called at the end of a step, perhaps several times."""
        ...


class Reader:
    """A task of an event loop, and the outlet for what it need not see."""

    __slots__ = ("_events", "_lock", "_outlet", "_waiting", "loop")

    def __init__(self, outlet: Outlet | None) -> None:
        self.loop = asyncio.get_running_loop()
        self._outlet = outlet
        self._lock = threading.Lock()
        self._events: list[Indexed] = []
        self._waiting: asyncio.Future[None] | None = None

    def offer(self, index: int, event: GenerationEvent) -> Outlet | None:
        """Return the outlet if it has taken an event. For the engine's thread."""
        if event.finish_reason is not None:
            return None
        with self._lock:
            outlet = self._outlet
            return outlet if outlet is not None and outlet.take(index, event) else None

    def close_outlet(self) -> None:
        """Let the outlet take nothing from now on, and wait for what it is taking."""
        with self._lock:
            self._outlet = None

    def put(self, index: int, event: GenerationEvent) -> None:
        """Add an event and wake the task."""
        self._events.append((index, event))
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> list[Indexed]:
        """Return all events that are there, in order; wait for the first."""
        if not self._events:
            self._waiting = self.loop.create_future()
            await self._waiting
        events, self._events = self._events, []
        return events


Delivery = tuple[Reader, int, GenerationEvent]


def hand_over(deliveries: list[Delivery]) -> None:
    """Give events to the tasks of this event loop."""
    for reader, index, event in deliveries:
        reader.put(index, event)
