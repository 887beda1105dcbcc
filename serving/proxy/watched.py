"""Responses on their way through the proxy: the short way of their pieces, and their ends."""

import asyncio

from starlette.types import Message, Send

from ...errors import RequestError
from ..relay.frames import HEADER as RELAY
from ..relay.receiver import IncomingStream
from .held import Held

RELAY_LAG_S = 10.0
"""Time for the last pieces of a stream to arrive after Ray has said that it is over."""


class Watched:
    """A response on its way, and what it lacks."""

    def __init__(
        self,
        path: str,
        send: Send,
        incoming: IncomingStream | None,
        held: Held,
    ) -> None:
        self._path, self.unwatched, self._incoming = path, send, incoming
        self._held = held
        self._copying: asyncio.Task[None] | None = None
        """Sends what comes by the short way, if the response does."""
        self.is_started = False
        self._is_finished = self._is_stream = False
        self._rays_status: int | None = None
        self._rays_words = b""

    async def send(self, message: Message) -> None:
        """Pass a message on, unless it is an error in Ray's own words."""
        if message["type"] == "http.response.start":
            types = [value for name, value in message["headers"] if name == b"content-type"]
            self._is_stream = any(value.startswith(b"text/event-stream") for value in types)
            # Ours are JSON. Those under /-/ are for Ray's users, who know them.
            is_plain = any(value.startswith(b"text/plain") for value in types)
            if message["status"] >= 400 and is_plain and not self._path.startswith("/-/"):
                self._rays_status = message["status"]
                return
            self.is_started = True
            self._held.has_arrived()
            await self._start(message)
            return
        if message["type"] == "http.response.body":
            if self._rays_status is not None:
                self._rays_words += message.get("body", b"")
                return
            if not await self._has_copied():
                return
            self._is_finished = not message.get("more_body", False)
            if self._is_finished:
                self._held.has_ended()
        await self.unwatched(message)

    async def _start(self, message: Message) -> None:
        """Send the head; then, if the replica took the short way, what comes by it."""
        headers = [(name, value) for name, value in message["headers"] if name != RELAY]
        is_relayed = len(headers) < len(message["headers"])
        await self.unwatched({**message, "headers": headers} if is_relayed else message)
        if is_relayed and self._incoming is not None:
            self._copying = asyncio.create_task(self._incoming.copy_to(self.unwatched))

    async def _has_copied(self) -> bool:
        """Wait until all that comes by the short way is sent; say whether it came whole."""
        if self._copying is None or self._incoming is None:
            return True
        await self._incoming.end_within(RELAY_LAG_S)
        await self._copying
        return self._incoming.is_whole

    async def what_is_missing(self) -> RequestError | None:
        """Return the error that an unfinished response should end with."""
        if self._rays_status is not None:
            words = " ".join(self._rays_words.decode(errors="replace").split())
            return RequestError(words or "the server cannot answer.", status=self._rays_status)
        if not self.is_started or (self._is_stream and not self._is_finished):
            await self._has_copied()
            return RequestError(
                "the server lost the process that worked on this request; send it again.",
                code="unavailable",
                status=503,
                retry_after_s=1,
            )
        return None

    def stop(self) -> None:
        """Send nothing more."""
        if self._copying is not None:
            self._copying.cancel()
