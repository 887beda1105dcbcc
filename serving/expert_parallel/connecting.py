"""How a leader and an owner find each other and prove that they know the same secret."""

import contextlib
import hashlib
import hmac
import secrets
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .channel import Channel, LostPeerError
from .frames import Head, Kind
from .lobby import HANDSHAKE_S, Lobby
from .shared_channel import SharedChannel
from .tcp_channel import TcpChannel

NONCE_BYTES = PROOF_BYTES = 32
MOST_FACTS_BYTES = 1 << 16


class Address(NamedTuple):
    """Where an owner listens."""

    host: str
    """Of TCP; empty for a Unix socket."""
    port: int
    name: str
    """Of a Unix socket in the abstract namespace, which needs no file; empty for TCP."""


def host_identity() -> str:
    """Return a text that two processes have in common if a Unix socket can join them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:  # not Linux: joined by TCP
        return secrets.token_hex(16)


class Listener:
    """The end of an owner: one leader at a time may connect."""

    def __init__(self, secret: bytes, leaders_host: str, own_address: str = "127.0.0.1") -> None:
        """Listen for a leader whose :func:`host_identity` is ``leaders_host``.

        On one host through a Unix socket; else by TCP on ``own_address`` alone, at a free port.
        """
        self._secret = secret
        self._is_local = leaders_host == host_identity() and sys.platform == "linux"
        if self._is_local:
            name = f"moeyard-{secrets.token_hex(16)}"
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.bind(f"\0{name}")
            self.address = Address("", 0, name)
        else:
            family = socket.AF_INET6 if ":" in own_address else socket.AF_INET
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.bind((own_address, 0))
            self.address = Address(own_address, self._socket.getsockname()[1], "")
        self._socket.listen(4)

    def accept(self, facts: Tensor) -> Channel:
        """Wait for a leader that knows the secret and send it the owner's facts."""
        open_channel = SharedChannel if self._is_local else TcpChannel
        with closing(Lobby(self._socket, open_channel, self._authenticate)) as lobby:
            while True:
                channel = lobby.next_leader()
                try:
                    channel.send(Head(Kind.FACTS), [facts])
                    channel.limit(0)
                    return channel
                except LostPeerError:
                    channel.close()

    def close(self) -> None:
        """Stop listening, and end a wait for a leader."""
        with contextlib.suppress(OSError):  # it wakes a thread that waits in accept
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _authenticate(self, channel: Channel) -> None:
        theirs = _expect(channel, Kind.HELLO)[:NONCE_BYTES]
        own = secrets.token_bytes(NONCE_BYTES)
        proof = _proof(self._secret, b"owner", theirs, own)
        channel.send(Head(Kind.CHALLENGE), [_tensor(own + proof)])
        answer = _expect(channel, Kind.PROOF)[:PROOF_BYTES]
        if not hmac.compare_digest(answer, _proof(self._secret, b"leader", theirs, own)):
            raise LostPeerError("it does not know the secret")


def connect(address: Address, secret: bytes) -> tuple[Channel, bytes]:
    """Return a channel to an owner that knows the secret, and its facts.

    Raises :class:`LostPeerError`.
    """
    channel = _open(address)
    try:
        channel.limit(HANDSHAKE_S)
        own = secrets.token_bytes(NONCE_BYTES)
        channel.send(Head(Kind.HELLO), [_tensor(own)])
        answer = _expect(channel, Kind.CHALLENGE)
        theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:][:PROOF_BYTES]
        if not hmac.compare_digest(proof, _proof(secret, b"owner", own, theirs)):
            raise LostPeerError("it does not know the secret")
        channel.send(Head(Kind.PROOF), [_tensor(_proof(secret, b"leader", own, theirs))])
        facts = _expect(channel, Kind.FACTS)
        channel.limit(0)
    except BaseException:
        channel.close()
        raise
    return channel, facts.rstrip(b"\0")


def _open(address: Address) -> Channel:
    try:
        if address.name:
            local = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            local.connect(f"\0{address.name}")
            return SharedChannel(local)
        remote = socket.create_connection((address.host, address.port), timeout=HANDSHAKE_S)
        remote.settimeout(None)
        return TcpChannel(remote)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LostPeerError(f"it cannot be reached ({reason})") from None


def _expect(channel: Channel, kind: Kind) -> bytes:
    """Return the payload of a frame, with the gap behind its last part."""
    head, payload = channel.receive(MOST_FACTS_BYTES)
    if head.kind != kind:
        raise LostPeerError("it sent another frame than a handshake needs")
    return bytes(payload.numpy())


def _proof(secret: bytes, role: bytes, leaders_nonce: bytes, owners_nonce: bytes) -> bytes:
    return hmac.digest(secret, role + leaders_nonce + owners_nonce, hashlib.sha256)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
