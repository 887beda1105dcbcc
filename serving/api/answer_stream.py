"""A stream that holds its places until it is sent, by the short way where there is one."""

from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..relay.frames import HEADER
from ..relay.sender import RelayedStream, relayed

Pieces = Callable[[RelayedStream | None], AsyncGenerator[bytes]]
"""Makes the pieces of a stream, but for those that it sends by the short way itself."""


class AnswerStream(StreamingResponse):
    """Server-sent events, and what is released when they have been sent or have failed."""

    def __init__(self, pieces: Pieces, held: ExitStack) -> None:
        super().__init__((), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._make = pieces
        self._held = held
        self._way: RelayedStream | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, then release."""
        with self._held:
            self._way = relayed(scope)
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send all pieces. By the short way, ``send`` carries the head and the end alone."""
        if self._way is not None:
            await self._relay(self._way, send)
            return
        async with aclosing(self._make(None)) as pieces:
            self.body_iterator = pieces
            await super().stream_response(send)

    async def _relay(self, way: RelayedStream, send: Send) -> None:
        headers = [*self.raw_headers, (HEADER, b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        is_whole = False
        try:
            # Until it is closed, the engine's thread may write, and nothing may follow the end.
            async with aclosing(self._make(way)) as pieces:
                async for piece in pieces:
                    if not way.is_open:
                        return  # the proxy is gone, and its clients with it
                    way.write(piece)
            is_whole = True
        finally:
            way.end(is_whole)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
