"""A proxy's end: a socket that replicas of this machine send the pieces of streams to."""

import asyncio
import secrets
import sys

from starlette.types import Send

from .frames import WHOLE, FrameReader, is_same_user, unix_socket


class IncomingStream:
    """What a replica sends for one request, until it ends or breaks off."""

    def __init__(self, address: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        """Value of the header that tells the replica."""
        self.is_whole = False
        self._loop = loop
        self._pieces: list[bytes] = []
        self._ended = asyncio.Event()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, piece: bytes) -> None:
        """Add a piece."""
        self._pieces.append(piece)
        self._wake()

    def end(self, is_whole: bool) -> None:
        """Say that nothing more comes."""
        if not self._ended.is_set():
            self.is_whole = is_whole
            self._ended.set()
            self._wake()

    async def end_within(self, seconds: float) -> None:
        """Wait for the end; break off when it has not come in this time."""
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except TimeoutError:
            self.end(is_whole=False)

    async def copy_to(self, send: Send) -> None:
        """Send on what comes, all that waits as one message, until the stream ends."""
        while True:
            if self._pieces:
                body, self._pieces = b"".join(self._pieces), []
                await send({"type": "http.response.body", "body": body, "more_body": True})
            elif self._ended.is_set():
                return
            else:
                self._waiting = self._loop.create_future()
                await self._waiting

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class _Link(asyncio.Protocol):
    """The connection of one replica."""

    def __init__(self, streams: dict[int, IncomingStream]) -> None:
        self._streams = streams
        self._own: set[int] = set()
        """Ids of streams that this replica has begun and not ended."""
        self._reader = FrameReader()
        self._is_trusted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let processes of this user in."""
        self._is_trusted = is_same_user(transport.get_extra_info("socket"))
        if not self._is_trusted:
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Give every stream its piece; streams that no request waits for any more have none."""
        if not self._is_trusted:
            return
        for number, piece in self._reader.feed(data):
            stream = self._streams.get(number)
            if stream is None:
                self._own.discard(number)
            elif isinstance(piece, bytes):
                self._own.add(number)
                stream.put(piece)
            else:
                self._own.discard(number)
                stream.end(piece == WHOLE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Break off what the replica has not ended."""
        for number in self._own:
            if number in self._streams:
                self._streams[number].end(is_whole=False)


class Relay:
    """The socket of this process, opened when the first request comes."""

    def __init__(self) -> None:
        self._streams: dict[int, IncomingStream] = {}
        self._name: str | None = None
        self._server: asyncio.AbstractServer | None = None

    async def open(self) -> IncomingStream | None:
        """Return a stream that a replica may use, or None where the system has no such sockets."""
        if sys.platform != "linux":
            return None
        loop = asyncio.get_running_loop()
        if self._name is None:
            self._name = f"moeyard-{secrets.token_hex(16)}"
            end = unix_socket()
            end.bind("\0" + self._name)
            self._server = await loop.create_unix_server(lambda: _Link(self._streams), sock=end)
        number = secrets.randbits(64)
        stream = IncomingStream(f"{self._name}.{number:016x}".encode(), loop)
        self._streams[number] = stream
        return stream

    def close(self, stream: IncomingStream) -> None:
        """Forget a stream: its request has been answered, or its client has left."""
        del self._streams[int(stream.address[-16:], 16)]
