"""Connections to other ranks, read and written by one thread.

Rank 0 listens; the others connect to it and show the run's token. Everything here and in the
owner's state happens under one lock, ``changed``, whose waiters are woken after each round.
"""

import os
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from .link import Link, Message

BEAT_S = 1.0
FLUSH_S = 3.0
"""Most seconds to wait until the last messages are sent."""


@dataclass
class Peer:
    """Another rank, as last heard of."""

    rank: int
    where: str
    """``rank 3 on HOST (process 123)``."""
    link: Link
    heard: float
    """When its last message came. All times here are of the monotonic clock."""
    moved: float
    """When its count of moves last rose."""
    moves: int = -1
    doing: str = "at the start"
    has_left: bool = False
    values: dict[int, Any] = field(default_factory=dict)
    """The values it sent, by turn."""

    def has_value(self, turn: int) -> bool:
        """Say whether its value of a turn has arrived."""
        return turn in self.values

    def is_gone(self) -> bool:
        """Say whether it has said goodbye."""
        return self.has_left


class Owner(Protocol):
    """Receives the thread's calls, all under the lock except ``after_round``."""

    def heard(self, peer: Peer, message: Message) -> None:
        """See a message."""

    def ended(self, peer: Peer) -> None:
        """See that a connection has ended, after its last message."""

    def beat(self) -> None:
        """Do the periodic work; called every ``BEAT_S``."""

    def after_round(self) -> None:
        """Do the work that must not hold the lock."""


class Peers:
    """All other ranks on rank 0; rank 0 elsewhere."""

    def __init__(self, rank: int, world_size: int, token: str, owner: Owner) -> None:
        self._rank, self._world_size, self._token = rank, world_size, token
        self._owner = owner
        self.by_rank: dict[int, Peer] = {}
        self.are_complete = world_size == 1
        self.changed = threading.Condition()
        self._strangers: list[Link] = []
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ, self._wakened)
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="moeyard-watch", daemon=True)

    def listen(self, host: str) -> int:
        """Accept the other ranks on rank 0; return the port. ``host`` "" means every interface."""
        self._listener = socket.create_server((host, 0), backlog=self._world_size)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._listener)
        port: int = self._listener.getsockname()[1]
        self._thread.start()
        return port

    def connect(self, host: str, port: int, timeout_s: float) -> None:
        """Join rank 0 from another rank. Raises :class:`OSError` if nothing listens there."""
        link = Link(socket.create_connection((host, port), timeout=timeout_s))
        link.is_trusted = True
        self._add(0, f"rank 0 on {host}", link)
        facts = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid()}
        link.send({"kind": "hello", "token": self._token, **facts})
        self._thread.start()

    def send(self, message: Message) -> None:
        """Send to all of them."""
        with self.changed:
            for peer in self.by_rank.values():
                peer.link.send(message)
        self._wake()

    def flush(self) -> None:
        """Wait until everything is sent, for ``FLUSH_S`` at most."""
        until = time.monotonic() + FLUSH_S
        with self.changed:
            while time.monotonic() < until and self._have_unsent():
                self.changed.wait(BEAT_S)

    def close(self) -> None:
        """End the thread and close the connections; a second call does nothing."""
        with self.changed:
            if self._closing:
                return
            self._closing = True
        self._wake()
        self._thread.join(timeout=2 * BEAT_S)
        for link in [*self._strangers, *(peer.link for peer in self.by_rank.values())]:
            link.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()
        self._waker.close()
        self._wakened.close()

    def _have_unsent(self) -> bool:
        return any(peer.link.has_unsent for peer in self.by_rank.values())

    def _wake(self) -> None:
        try:
            self._waker.send(b".")
        except BlockingIOError:
            return  # the thread is awake already

    def _add(self, rank: int, where: str, link: Link) -> Peer:
        now = time.monotonic()
        self.by_rank[rank] = Peer(rank, where, link, heard=now, moved=now)
        self._selector.register(link.socket, selectors.EVENT_READ, self.by_rank[rank])
        return self.by_rank[rank]

    def _run(self) -> None:
        next_beat = 0.0
        while True:
            ready = self._selector.select(max(0.0, next_beat - time.monotonic()))
            with self.changed:
                if self._closing:
                    return
                for key, _ in ready:
                    self._read(key.data)
                for peer in self.by_rank.values():
                    peer.link.flush()
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + BEAT_S
                    self._owner.beat()
                self.changed.notify_all()
            self._owner.after_round()

    def _read(self, source: Any) -> None:
        if self._listener is not None and source is self._listener:
            connected, _ = self._listener.accept()
            stranger = Link(connected)
            self._strangers.append(stranger)
            self._selector.register(connected, selectors.EVENT_READ, stranger)
        elif isinstance(source, Link):
            self._read_stranger(source)
        elif isinstance(source, Peer):
            self._read_peer(source)
        else:
            source.recv(4096)  # the waker's bytes

    def _read_stranger(self, link: Link) -> None:
        messages = link.receive()
        if not messages and link.is_open:
            return
        self._selector.unregister(link.socket)
        self._strangers.remove(link)
        hello = messages[0] if messages else {}
        if hello.get("token") != self._token or hello["rank"] in self.by_rank:
            link.close()
            return
        rank = hello["rank"]
        link.is_trusted = True
        where = f"rank {rank} on {hello['host']} (process {hello['pid']})"
        peer = self._add(rank, where, link)
        for message in messages[1:]:
            self._owner.heard(peer, message)
        if len(self.by_rank) == self._world_size - 1:
            self.are_complete = True
            self.send({"kind": "all_here", "host": socket.gethostname(), "pid": os.getpid()})

    def _read_peer(self, peer: Peer) -> None:
        for message in peer.link.receive():
            peer.heard = time.monotonic()
            match message["kind"]:
                case "beat":
                    peer.doing = message["doing"]
                    if message["moves"] != peer.moves:
                        peer.moves, peer.moved = message["moves"], time.monotonic()
                case "all_here":
                    self.are_complete = True
                    peer.where = f"rank 0 on {message['host']} (process {message['pid']})"
                case "bye":
                    peer.has_left = True
                case _:
                    self._owner.heard(peer, message)
        if not peer.link.is_open:
            self._selector.unregister(peer.link.socket)
            if not peer.has_left:
                self._owner.ended(peer)
