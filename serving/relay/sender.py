"""A replica's end: streams that asked for the short way share one connection to their proxy.

What all streams have to say after a step of the engine leaves in one write.
"""

import asyncio
import re
import sys
from typing import Any

from starlette.types import Scope

from .frames import CUT, HEADER, WHOLE, end_frame, frame, is_same_user, unix_socket

_ADDRESS = re.compile(rb"(moeyard-[0-9a-f]{32})\.([0-9a-f]{16})")
"""Socket and stream. A header with anything else is ignored, so a replica connects nowhere else."""


class _Link(asyncio.Protocol):
    """The connection to one proxy."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: Any = None  # uvloop's are not asyncio's
        self._frames: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        """Keep the connection if the other end is ours."""
        if is_same_user(transport):
            self.transport = transport
        else:
            transport.close()

    @property
    def is_open(self) -> bool:
        """Whether frames reach the proxy."""
        return self.transport is not None and not self.transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send a frame, together with those of other streams that are ready by then."""
        if not self._frames:
            self.loop.call_soon(self._flush)
        self._frames.append(data)

    def _flush(self) -> None:
        frames, self._frames = self._frames, []
        if self.is_open:
            self.transport.write(b"".join(frames))


class RelayedStream:
    """One stream on its short way."""

    def __init__(self, link: _Link, stream: int) -> None:
        self._link, self._stream = link, stream

    @property
    def is_open(self) -> bool:
        """Whether the proxy is there."""
        return self._link.is_open

    def write(self, piece: bytes) -> None:
        """Send a piece, which is not empty."""
        self._link.write(frame(self._stream, piece))

    def end(self, is_whole: bool) -> None:
        """Say that nothing more comes."""
        self._link.write(end_frame(self._stream, WHOLE if is_whole else CUT))


_links: dict[bytes, asyncio.Task[_Link | None]] = {}
"""By the proxy's socket; of a proxy that is gone until another one is connected to."""


async def relayed(scope: Scope) -> RelayedStream | None:
    """Return the short way for the answer to a request, or None where there is none.

    A proxy on another machine offers a socket that is not here.
    """
    offered = dict(scope["headers"]).get(HEADER)
    found = None if offered is None else _ADDRESS.fullmatch(offered)
    if found is None or sys.platform != "linux":
        return None
    name, stream = found[1], int(found[2], 16)
    if not _is_usable(_links.get(name)):
        for other in [other for other, link in _links.items() if not _is_usable(link)]:
            del _links[other]
        _links[name] = asyncio.create_task(_connect(name))
    # A request that ends meanwhile leaves the connection to the others that wait for it.
    link = await asyncio.shield(_links[name])
    return None if link is None else RelayedStream(link, stream)


def _is_usable(link: asyncio.Task[_Link | None] | None) -> bool:
    if link is None or link.get_loop() is not asyncio.get_running_loop():
        return False
    if not link.done():
        return True
    found = link.result()
    return found is not None and found.is_open


async def _connect(name: bytes) -> _Link | None:
    end = unix_socket()
    try:
        end.connect(b"\0" + name)
    except OSError:
        end.close()
        return None
    _, link = await asyncio.get_running_loop().create_unix_connection(_Link, sock=end)
    return link if link.is_open else None
