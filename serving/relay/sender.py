"""A replica's end: streams that asked for the short way share one connection to their proxy."""

import asyncio
import re
import sys

from starlette.types import Scope

from .frames import CUT, HEADER, WHOLE, end_frame, frame, is_same_user, unix_socket
from .link import Link

_ADDRESS = re.compile(rb"(moeyard-[0-9a-f]{32})\.([0-9a-f]{16})")
"""Socket and stream. A header with anything else is ignored, so a replica connects nowhere else."""


class RelayedStream:
    """One stream on its short way."""

    def __init__(self, link: Link, stream: int) -> None:
        self._link, self._stream = link, stream

    @property
    def is_open(self) -> bool:
        """Whether the proxy is there."""
        return self._link.is_open

    def write(self, piece: bytes) -> None:
        """Send a piece, which is not empty. For the event loop."""
        self._link.write(frame(self._stream, piece))

    def add(self, piece: bytes) -> bool:
        """Have the next :meth:`flush` send a piece; False if the proxy is gone. For any thread."""
        return self._link.add(frame(self._stream, piece))

    def flush(self) -> None:
        """Send what was added, by this stream and others. For any thread."""
        self._link.flush()

    def end(self, is_whole: bool) -> None:
        """Say that nothing more comes."""
        self._link.write(end_frame(self._stream, WHOLE if is_whole else CUT))


_links: dict[bytes, Link] = {}
"""By the proxy's socket; of a proxy that is gone until another one is connected to."""


def relayed(scope: Scope) -> RelayedStream | None:
    """Return the short way for the answer to a request, or None where there is none.

    For the event loop. A proxy on another machine offers a socket that is not here.
    """
    offered = dict(scope["headers"]).get(HEADER)
    found = None if offered is None else _ADDRESS.fullmatch(offered)
    if found is None or sys.platform != "linux":
        return None
    name, stream = found[1], int(found[2], 16)
    link = _links.get(name)
    if link is None or not _is_usable(link):
        for other in [other for other, link in _links.items() if not _is_usable(link)]:
            _links.pop(other).close()
        link = _connect(name)
        if link is None:
            return None
        _links[name] = link
    return RelayedStream(link, stream)


def _is_usable(link: Link) -> bool:
    return link.is_open and link.loop is asyncio.get_running_loop()


def _connect(name: bytes) -> Link | None:
    end = unix_socket()
    try:
        end.connect(b"\0" + name)
    except OSError:
        end.close()
        return None
    if not is_same_user(end):
        end.close()
        return None
    return Link(end)
