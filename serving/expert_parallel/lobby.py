"""Where connections wait until they have proved that they know the secret.

Each has a thread that asks it, so one that says nothing keeps no leader out.
"""

import contextlib
import errno
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from .channel import Channel, LostPeerError

HANDSHAKE_S = 10.0
"""Time for a handshake; a leader waits as long for each of its steps."""
MOST_GUESTS = 32
"""Connections that are asked at a time. One more takes the place of the one that came first: a
leader needs milliseconds."""


class Lobby:
    """The connections of one listening socket, until one of them is a leader's."""

    def __init__(
        self,
        listening: socket.socket,
        open_channel: Callable[[socket.socket], Channel],
        authenticate: Callable[[Channel], None],
    ) -> None:
        """``authenticate`` raises :class:`LostPeerError` for a channel without the secret."""
        self._listening = listening
        self._open_channel, self._authenticate = open_channel, authenticate
        self._lock = threading.Lock()
        self._guests: dict[socket.socket, float] = {}
        """When each has to be done, the first one first."""
        self._proved = deque[Channel]()
        self._bell, self._ear = socket.socketpair()

    def next_leader(self) -> Channel:
        """Wait for a channel that knows the secret. Raises OSError once the listener is closed."""
        while not self._proved:
            door = self._listening.fileno()  # once: another thread may close it at any moment
            if door < 0:
                raise OSError(errno.EBADF, "the listener is closed")
            waiting = select.poll()
            waiting.register(door, select.POLLIN)
            waiting.register(self._ear, select.POLLIN)
            events = [number for number, _ in waiting.poll(self._turn_away_late_ones())]
            if self._ear.fileno() in events:
                self._ear.recv(1)
            if door in events:
                self._let_in(self._listening.accept()[0])
        return self._proved.popleft()

    def close(self) -> None:
        """Turn away all that are here."""
        with self._lock:
            for guest in list(self._guests):
                self._turn_away(guest)
            self._bell.close()
            self._ear.close()
        for channel in self._proved:
            channel.close()

    def _let_in(self, guest: socket.socket) -> None:
        with self._lock:
            self._guests[guest] = time.monotonic() + HANDSHAKE_S
            if len(self._guests) > MOST_GUESTS:
                self._turn_away(next(iter(self._guests)))
        threading.Thread(target=self._ask, args=(guest,), name="handshake", daemon=True).start()

    def _ask(self, guest: socket.socket) -> None:
        channel: Channel | None = None
        has_proved = False
        with contextlib.suppress(LostPeerError, OSError):
            channel = self._open_channel(guest)
            channel.limit(HANDSHAKE_S)
            self._authenticate(channel)
            has_proved = True
        with self._lock:
            is_here = self._guests.pop(guest, None) is not None
            if has_proved and is_here and channel is not None:
                self._proved.append(channel)
                self._bell.send(b"!")
                return
        guest.close()

    def _turn_away_late_ones(self) -> float | None:
        """Return the milliseconds until the next guest is late; None without guests."""
        with self._lock:
            now = time.monotonic()
            for guest in [guest for guest, end in self._guests.items() if end <= now]:
                self._turn_away(guest)
            ends = self._guests.values()
            return 1000 * (min(ends) - now) + 1 if ends else None

    def _turn_away(self, guest: socket.socket) -> None:
        """Wake the thread that asks a guest; it closes the connection."""
        del self._guests[guest]
        with contextlib.suppress(OSError):  # it has gone
            guest.shutdown(socket.SHUT_RDWR)
