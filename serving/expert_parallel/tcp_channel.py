"""A connection between hosts: TCP, each frame with its payload behind the head.

gloo would need a group of all members, made anew by all of them when one is lost. A connection for
each owner ends alone, and says so at once. Nothing is encrypted, as with gloo.
"""

import socket
from collections.abc import Sequence

import torch
from torch import Tensor

from .channel import LARGEST_PAYLOAD, LostPeerError, bytes_of, set_limit
from .frames import ALIGNMENT, HEAD_BYTES, Head, offsets, pack, unpack

SILENT_FOR_S = 15
"""Seconds after which a host that acknowledges nothing counts as lost."""


class TcpChannel:
    """A :class:`.Channel` over a connected TCP socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_USER_TIMEOUT", SILENT_FOR_S * 1000),
            ("TCP_KEEPIDLE", SILENT_FOR_S // 3),
            ("TCP_KEEPINTVL", SILENT_FOR_S // 3),
            ("TCP_KEEPCNT", 2),
        ):
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._head = bytearray(HEAD_BYTES)
        self._buffer = torch.empty(1 << 16, dtype=torch.uint8)

    def send(self, head: Head, parts: Sequence[Tensor] = ()) -> int:
        """See :class:`.Channel`."""
        views = [bytes_of(part) for part in parts]
        _, total = offsets([len(view) for view in views])
        pieces: list[bytes | memoryview] = [pack(head._replace(payload=total))]
        for view in views:
            pieces += [view, bytes(-len(view) % ALIGNMENT)]
        left = HEAD_BYTES + total
        try:
            while left:
                sent = self._socket.sendmsg(pieces)
                left -= sent
                pieces = _after(pieces, sent)
        except OSError as error:
            raise LostPeerError(_why(error)) from None
        return total

    def receive(self, most_bytes: int = LARGEST_PAYLOAD) -> tuple[Head, Tensor]:
        """See :class:`.Channel`."""
        packed = memoryview(self._head)
        self._fill(packed)
        head = unpack(packed)
        if head.payload > most_bytes:
            raise LostPeerError("it sent a frame that is too large")
        if head.payload > len(self._buffer):
            self._buffer = torch.empty(head.payload, dtype=torch.uint8)
        payload = self._buffer[: head.payload]
        self._fill(bytes_of(payload))
        return head, payload

    def limit(self, seconds: float) -> None:
        """See :class:`.Channel`."""
        set_limit(self._socket, seconds)

    def close(self) -> None:
        """See :class:`.Channel`."""
        self._socket.close()

    def _fill(self, memory: memoryview) -> None:
        while memory:
            try:
                count = self._socket.recv_into(memory, flags=socket.MSG_WAITALL)
            except OSError as error:
                raise LostPeerError(_why(error)) from None
            if count == 0:
                raise LostPeerError("it has ended")
            memory = memory[count:]


def _after(pieces: list[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """Return what is left of the pieces when so many bytes are sent."""
    while pieces and sent >= len(pieces[0]):
        sent -= len(pieces.pop(0))
    if sent:
        pieces[0] = memoryview(pieces[0])[sent:]
    return pieces


def _why(error: OSError) -> str:
    if isinstance(error, BlockingIOError):
        return "it has not answered in time"
    return f"the connection has ended: {error.strerror}"
