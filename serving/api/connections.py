"""Limits on the connections of Ray's HTTP proxy before, between and after requests.

An ASGI application sees a request only after its head has arrived, and cannot end a response whose
client does not read. So a protocol class that replaces uvicorn's works one level lower. It only
watches and closes connections, and leaves parsing to uvicorn.

A connection *waits* while its client must act: send the rest of a request, or read a response. Once
a second, the server closes connections that wait too long, and the oldest of a client that has too
many. A client that sends whole requests never meets a limit, no matter how many it sends.
"""

import asyncio
import ipaddress
import resource
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ...errors import RequestError
from . import request_body
from .responses import error_response

READ_TIMEOUT_S = 30.0
"""Time for a client to read about 50 kB, asyncio's buffer between its watermarks."""
FREE_S = 1.0
"""Waiting that does not count: heads and bodies often come in separate packets."""
MAX_WAITING_PER_CLIENT = 64
MAX_WAITING = 512
"""Each may hold a body of 1 MiB, so this bounds memory too."""
MAX_HEAD_BYTES = 64 << 10
"""Twice what the application accepts; httptools itself has no limit."""
SHARE_OF_FILES = 0.8
"""Share of the process's open files that connections may use."""
SWEEP_EVERY_S = 1.0
STATE_KEY = "moeyard.connection"
"""Key of a request's connection in ``scope["state"]``."""

Phase = Literal["idle", "head", "body", "answer"]


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's HTTP protocol, watched."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ws_protocol_class = None  # no websockets here; they would escape the limits
        self.app_state: dict[str, Any] = {**options["app_state"], STATE_KEY: self}
        self._num_head_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._stalled_since: float | None = None
        self.enter("head")

    def enter(self, phase: Phase) -> None:
        """Note the connection's phase from now on; the guard around the application calls this."""
        self.phase = phase
        self.since = self._loop.time()

    @property
    def waits_since(self) -> float | None:
        """When the client began to keep the server waiting, or None."""
        if self._stalled_since is not None:
            return self._stalled_since
        return self.since if self.phase in ("head", "body") else None

    @property
    def has_unsent(self) -> bool:
        """Whether bytes of a response still lie in this process."""
        return bool(self.transport.get_write_buffer_size() > 0)

    def connection_made(self, transport: Any) -> None:
        """Watch a new connection, which waits for a request."""
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.client_key = _client_key(peer[0]) if isinstance(peer, tuple) else ""
        connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching it."""
        connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on to the parser, and limit the size of the head."""
        if self.phase == "idle":
            self.enter("head")
            self._num_head_bytes = 0
        cycle = self.cycle
        super().data_received(data)
        if self.phase == "head" and self.cycle is cycle and not self.transport.is_closing():
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self.refuse(
                    RequestError(
                        f"the headers have more than {MAX_HEAD_BYTES} bytes; send fewer.",
                        status=431,
                    )
                )

    def pause_writing(self) -> None:
        """Note that the client has stopped reading."""
        super().pause_writing()
        self._stalled_since = self._loop.time()

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        super().resume_writing()
        self._stalled_since = None

    def end_if_late(self, now: float) -> None:
        """Close the connection if its client has kept the server waiting for too long."""
        if self.transport.is_closing():
            if self._stalled_since is None:
                self._stalled_since = now  # the client must read the rest in time, too
        elif self.phase == "head" and now - self.since > request_body.BODY_TIMEOUT_S:
            self.refuse(request_body.late_request(f"of the head, {self._num_head_bytes} bytes"))
        # The guard answers late bodies; these requests were answered before they were whole.
        elif self.phase == "body" and now - self.since > request_body.BODY_TIMEOUT_S + FREE_S:
            self.transport.close()
        if self._stalled_since is not None and now - self._stalled_since > READ_TIMEOUT_S:
            self.transport.abort()

    def refuse(self, error: RequestError) -> None:
        """Send the error if no response has begun, and close."""
        if self._stalled_since is not None:
            self.transport.abort()
            return
        if self.phase == "head":
            is_silent = self._num_head_bytes > 0
        else:
            is_silent = self.phase == "body" and not self.cycle.response_started
        if is_silent:
            self.transport.write(_raw(error))
        self.transport.close()


class Connections:
    """The open connections of one event loop."""

    def __init__(self) -> None:
        self._open: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def add(self, connection: Connection) -> None:
        """Watch a connection."""
        self._open.add(connection)
        if self._timer is None:
            self._timer = self._sweep_later()

    def discard(self, connection: Connection) -> None:
        """Stop watching a connection."""
        self._open.discard(connection)

    @property
    def num_unsent(self) -> int:
        """Connections with bytes of responses that still lie in this process."""
        return sum(connection.has_unsent for connection in self._open)

    def _sweep_later(self) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + SWEEP_EVERY_S
        return loop.call_later(SWEEP_EVERY_S, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        # What a busy loop has not read yet, it would otherwise blame on clients. It is late by as
        # much as one round takes, and a new connection's first bytes are read in the next round.
        free_s = FREE_S + 2 * (now - self._due)
        for connection in list(self._open):
            connection.end_if_late(now)
        waiting = [
            connection
            for connection in self._open
            if connection.waits_since is not None and now - connection.waits_since > free_s
        ]
        by_client = defaultdict(list)
        for connection in waiting:
            by_client[connection.client_key].append(connection)
        for group in by_client.values():
            _close_oldest(group, MAX_WAITING_PER_CLIENT)
        _close_oldest(waiting, MAX_WAITING)
        self._keep_files(waiting)
        self._timer = self._sweep_later() if self._open else None

    def _keep_files(self, waiting: list[Connection]) -> None:
        """Close idle and waiting connections when too few files are left for new ones."""
        limit = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * SHARE_OF_FILES)
        if len(self._open) > limit:
            spare = [c for c in self._open if c.phase == "idle"] + waiting
            _close_oldest(spare, max(0, limit - (len(self._open) - len(spare))))


connections = Connections()
"""The connections of this process."""


def _close_oldest(group: Iterable[Connection], num_kept: int) -> None:
    """Close the connections that have waited longest; keep ``num_kept``."""
    alive = [connection for connection in group if not connection.transport.is_closing()]
    alive.sort(key=lambda connection: connection.waits_since or connection.since)
    for connection in alive[: max(0, len(alive) - num_kept)]:
        connection.refuse(
            RequestError(
                "the server waits for the rest of too many requests; send each in one piece.",
                code="rate_limit_exceeded",
                status=429,
                retry_after_s=1,
            )
        )


def _client_key(address: str) -> str:
    """Return what stands for one client: an IPv4 address, or the /64 that one host has in IPv6."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _raw(error: RequestError) -> bytes:
    """Return the raw bytes of a response that no application can send."""
    response = error_response(error)
    response.headers["Connection"] = "close"
    headers = b"".join(b"%b: %b\r\n" % pair for pair in response.raw_headers)
    return b"HTTP/1.1 %d Refused\r\n%b\r\n%b" % (error.status, headers, bytes(response.body))
