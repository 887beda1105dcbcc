"""A connection on one host: small payloads through a Unix socket, large ones in shared memory.

The socket keeps the borders of frames and wakes the reader; it ends when the other process does.
Each end writes into memory that it made with ``memfd_create`` and whose descriptor went over the
socket, so no name remains after ``kill -9``.
"""

import mmap
import os
import socket
from collections.abc import Sequence

import torch
from torch import Tensor

from .channel import LARGEST_PAYLOAD, LostPeerError, bytes_of, set_limit
from .frames import ALIGNMENT, HEAD_BYTES, Head, offsets, pack, unpack

INLINE_BYTES = 32 << 10
"""Payloads up to this go through the socket: copying them there costs less than a second look."""
PREFIX = -(-HEAD_BYTES // ALIGNMENT) * ALIGNMENT
"""Where the payload begins in a packet."""
SMALLEST_MEMORY = 1 << 20


class SharedChannel:
    """A :class:`.Channel` over a connected ``AF_UNIX`` socket of type ``SOCK_SEQPACKET``."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._packet = torch.empty(PREFIX + INLINE_BYTES, dtype=torch.uint8)
        self._packet_view = bytes_of(self._packet)
        self._outgoing = self._incoming = torch.empty(0, dtype=torch.uint8)

    def send(self, head: Head, parts: Sequence[Tensor] = ()) -> int:
        """See :class:`.Channel`."""
        views = [bytes_of(part) for part in parts]
        starts, total = offsets([len(view) for view in views])
        packed = pack(head._replace(payload=total))
        try:
            if total <= INLINE_BYTES:
                self._socket.sendmsg(_with_gaps(packed, views))
                return total
            ancillary = []
            descriptor = -1
            if total > len(self._outgoing):
                descriptor, self._outgoing = _new_memory(total)
                rights = descriptor.to_bytes(4, "little")
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            memory = bytes_of(self._outgoing)
            for start, view in zip(starts, views, strict=True):
                memory[start : start + len(view)] = view
            try:
                self._socket.sendmsg([packed], ancillary)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        except OSError as error:
            raise LostPeerError(f"it cannot be reached ({_why(error)})") from None
        return total

    def receive(self, most_bytes: int = LARGEST_PAYLOAD) -> tuple[Head, Tensor]:
        """See :class:`.Channel`."""
        try:
            size, ancillary, _, _ = self._socket.recvmsg_into(
                [self._packet_view], socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise LostPeerError(_why(error)) from None
        if size == 0:
            raise LostPeerError("it has ended")
        for _, _, rights in ancillary:
            self._incoming = _map(int.from_bytes(rights[:4], "little"))
        if size < HEAD_BYTES:
            raise LostPeerError("it sent a damaged frame")
        head = unpack(self._packet_view)
        if head.payload > most_bytes:
            raise LostPeerError("it sent a frame that is too large")
        if head.payload <= INLINE_BYTES:
            return head, self._packet[PREFIX : PREFIX + head.payload]
        if head.payload > len(self._incoming):
            raise LostPeerError("it sent a damaged frame")
        return head, self._incoming[: head.payload]

    def limit(self, seconds: float) -> None:
        """See :class:`.Channel`."""
        set_limit(self._socket, seconds)

    def close(self) -> None:
        """See :class:`.Channel`."""
        self._socket.close()


def _with_gaps(packed: bytes, views: Sequence[memoryview]) -> list[bytes | memoryview]:
    """Return the pieces of a packet, each part at its place."""
    pieces: list[bytes | memoryview] = [packed, bytes(PREFIX - HEAD_BYTES)]
    for view in views:
        pieces += [view, bytes(-len(view) % ALIGNMENT)]
    return pieces


def _new_memory(num_bytes: int) -> tuple[int, Tensor]:
    """Return memory for ``num_bytes`` and more, and its descriptor."""
    size = max(SMALLEST_MEMORY, 1 << (num_bytes - 1).bit_length())
    descriptor = os.memfd_create("moeyard-rows", os.MFD_CLOEXEC)
    try:
        # Allocated now: a lack of memory is an error here and not a signal later.
        os.posix_fallocate(descriptor, 0, size)
        memory = mmap.mmap(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, torch.frombuffer(memory, dtype=torch.uint8)


def _map(descriptor: int) -> Tensor:
    try:
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _why(error: OSError) -> str:
    if isinstance(error, BlockingIOError):
        return "it has not answered in time"
    return f"it has ended: {error.strerror}"
