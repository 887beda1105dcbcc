"""Messages between two ranks: JSON, a line each, over a socket that never blocks."""

import json
import socket
from typing import Any

MOST_BYTES = 1 << 16
"""Bytes read at a time."""
MOST_BYTES_OF_A_STRANGER = 4096
"""Longest line accepted before the sender has shown the run's token."""

Message = dict[str, Any]


class Link:
    """One end of a connection. Not thread-safe."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connected
        self.is_trusted = False
        """Whether the other end has shown the run's token."""
        self.is_open = True
        self._received = bytearray()
        self._to_send = bytearray()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits for room in the kernel's buffer."""
        return self.is_open and bool(self._to_send)

    def send(self, message: Message) -> None:
        """Queue a message and send what the kernel takes."""
        self._to_send += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the kernel takes it."""
        if not self.has_unsent:
            return
        try:
            sent = self.socket.send(self._to_send)
        except BlockingIOError:
            return
        except OSError:
            return  # reading reports the end of the connection, after the last messages
        del self._to_send[:sent]

    def receive(self) -> list[Message]:
        """Return the messages received so far; ``is_open`` is False once no more can come."""
        self._read()
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        if not self.is_trusted and len(rest) > MOST_BYTES_OF_A_STRANGER:
            self.is_open = False
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            self.is_open = False
            return []

    def _read(self) -> None:
        while True:
            try:
                part = self.socket.recv(MOST_BYTES)
            except BlockingIOError:
                return
            except OSError:
                part = b""
            if not part:
                self.is_open = False
                return
            self._received += part
            if not self.is_trusted:
                return

    def close(self) -> None:
        """Close the socket."""
        self.is_open = False
        self.socket.close()
