"""A connection between a leader and an owner, whatever carries it."""

import socket
import struct
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, uint8

from .frames import Head

LARGEST_PAYLOAD = 1 << 34
"""Bytes; a head that asks for more is damaged."""


class LostPeerError(Exception):
    """The other end has gone, does not answer in time or sends what makes no sense."""


class Channel(Protocol):
    """Carries frames in order. One thread uses it.

    After a frame with a large payload the other end must answer before the next large one: the
    payload may lie in memory that both share.
    """

    def send(self, head: Head, parts: Sequence[Tensor] = ()) -> int:
        """Send a frame with contiguous CPU tensors as its payload; return the payload's bytes.

        Raises :class:`LostPeerError`.
        """
        ...

    def receive(self, most_bytes: int = LARGEST_PAYLOAD) -> tuple[Head, Tensor]:
        """Return the next frame and its payload, uint8 ``[payload]``, valid until the next call.

        Raises :class:`LostPeerError`, also for a payload above ``most_bytes``.
        """
        ...

    def limit(self, seconds: float) -> None:
        """Give up a wait after so many seconds; 0 = never."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


def set_limit(connection: socket.socket, seconds: float) -> None:
    """Let the kernel end waits: Python's own timeout would cost another system call for each."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def bytes_of(part: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return part.detach().reshape(-1).view(uint8).numpy().data
