"""What travels over the socket between a replica and a proxy: pieces of many streams.

A frame is the id of a stream, the number of bytes, and the bytes. Two numbers that no piece has
say that a stream has ended.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

HEADER = b"x-moeyard-relay"
"""In a request, where its stream may be sent; in a response, that it is sent there."""
WHOLE = 0
"""The stream ended as it should."""
CUT = 0xFFFF_FFFF
"""Its sender gave up."""
_HEAD = struct.Struct("<QI")
_PEER = struct.Struct("3i")
"""Process, user and group, see unix(7)."""


def frame(stream: int, piece: bytes) -> bytes:
    """Return a frame that carries a piece, which is not empty."""
    return _HEAD.pack(stream, len(piece)) + piece


def end_frame(stream: int, ending: int) -> bytes:
    """Return the frame that ends a stream: :data:`WHOLE` or :data:`CUT`."""
    return _HEAD.pack(stream, ending)


def unix_socket() -> socket.socket:
    """Return a socket for names in the abstract namespace, which no file stands for.

    It never waits. Event loops get it bound or connected: uvloop takes such names for paths.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.setblocking(False)
    return found


class FrameReader:
    """Cuts what a socket gives into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes | int]]:
        """Yield the streams and pieces, or endings, that are complete now."""
        data = self._rest + data if self._rest else data
        at = 0
        while len(data) - at >= _HEAD.size:
            stream, length = _HEAD.unpack_from(data, at)
            start = at + _HEAD.size
            if length in (WHOLE, CUT):
                at = start
                yield stream, length
                continue
            if len(data) < start + length:
                break
            at = start + length
            yield stream, data[start:at]
        self._rest = data[at:]


def is_same_user(end: Any) -> bool:
    """Say whether the process at the other end of a Unix socket runs as the user of this one."""
    peer = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return bool(_PEER.unpack(peer)[1] == os.getuid())
