"""A stream that holds its places until it is sent, by the short way where there is one."""

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..relay.frames import HEADER
from ..relay.sender import RelayedStream, relayed


class AnswerStream(StreamingResponse):
    """Server-sent events, and what is released when they have been sent or have failed."""

    def __init__(self, pieces: AsyncGenerator[bytes], held: ExitStack) -> None:
        super().__init__(
            pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._pieces = pieces
        self._held = held
        self._relayed: RelayedStream | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, then release."""
        with self._held:
            self._relayed = await relayed(scope)
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send all pieces. By the short way, ``send`` carries the head and the end alone."""
        if self._relayed is None:
            async with aclosing(self._pieces):
                await super().stream_response(send)
            return
        headers = [*self.raw_headers, (HEADER, b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        is_whole = False
        try:
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    if not self._relayed.is_open:
                        return  # the proxy is gone, and its clients with it
                    self._relayed.write(piece)
            is_whole = True
        finally:
            self._relayed.end(is_whole)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
