"""Runs inside Ray Serve's HTTP proxy, around its application.

The guard passes a request on to a replica only when it is complete. Ray counts it there from its
first byte, and a replica takes a limited number. So incomplete requests would shut out all others.
Deadlines and limits: ``request_body.py`` for bodies, ``connections.py`` for everything that happens
outside an application.

When a replica dies, Ray's proxy drops the connection in the middle of a stream, and answers a
request that had no response yet with a bare 500. Only the proxy outlives the replica, so the
event that tells the client is added here.

The pieces of a stream do not come through Ray if the replica runs on this machine. It sends them to
a socket of this process (``relay/``), where those of all its streams arrive in one read. Ray still
carries the head of the response and its end, counts the request and cancels it.

Ray loads this file if :data:`CALLBACK_VARIABLE` names it in the environment of the process that
starts Ray.
"""

import asyncio
import hmac
import os

import uvicorn.config
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from .api.connections import STATE_KEY, Connection, connections
from .api.request_body import read_body
from .api.responses import DONE, error_object, error_response, sse
from .relay.frames import HEADER
from .relay.receiver import IncomingStream, Relay

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "moeyard.serving.proxy_guard:middlewares"
UNFINISHED = "/-/unfinished"
"""Answers those who have Ray's token: how many responses are on their way to clients."""
RAYS_OWN_HEADERS = frozenset(
    {
        b"serve-multiplexed-model-id",
        b"x-request-disconnect-disabled",
        b"x-request-timeout-seconds",
        b"x-session-id",
    }
)
"""Ray obeys these from any client: they keep a request going after its client has left, set a
time limit, or name a replica."""
RELAY_LAG_S = 10.0
"""Time for the last pieces of a stream to arrive after Ray has said that it is over."""


def middlewares() -> list[Middleware]:
    """Return what Ray's proxy puts around its application."""
    # Ray leaves the protocol to uvicorn, which looks it up here when the server starts.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Connection.__module__}:{Connection.__name__}"
    return [Middleware(ProxyGuard)]


def ask_for_guard() -> None:
    """Have every Ray that this process starts from now on use the guard."""
    os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)


class ProxyGuard:
    """Let whole requests in, and finish responses that the application did not finish."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._num_open = 0
        self._relay = Relay()
        token = os.environ.get("RAY_AUTH_TOKEN")
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a request, pass it on and see that its response ends."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection: Connection | None = scope.get("state", {}).pop(STATE_KEY, None)
        if connection is not None:
            connection.enter("body")
        try:
            body = await read_body(receive)
        except ClientDisconnect:
            return
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        if connection is not None:
            connection.enter("answer")
        try:
            if scope["path"] == UNFINISHED and self._has_token(scope):
                number = self._num_open + connections.num_unsent
                await JSONResponse({"unfinished": number})(scope, receive, send)
            else:
                await self._pass_on(_without_orders(scope), _again(body, receive), send)
        finally:
            if connection is not None:
                connection.enter("idle")

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = await self._relay.open()
        if incoming is not None:
            scope["headers"].append((HEADER, incoming.address))
        response = _Watched(scope["path"], send, incoming)
        self._num_open += 1
        try:
            await self._app(scope, receive, response.send)
            error = await response.what_is_missing()
            if error is None:
                return
            if response.is_started:
                end = sse(error_object(error)) + DONE
                await send({"type": "http.response.body", "body": end})
            else:
                await error_response(error)(scope, receive, send)
        finally:
            self._num_open -= 1
            response.stop()
            if incoming is not None:
                self._relay.close(incoming)

    def _has_token(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._expected is not None and hmac.compare_digest(given, self._expected)


class _Watched:
    """A response on its way, and what it lacks."""

    def __init__(self, path: str, send: Send, incoming: IncomingStream | None) -> None:
        self._path, self._send, self._incoming = path, send, incoming
        self._copying: asyncio.Task[None] | None = None
        """Sends what comes by the short way, if the response does."""
        self.is_started = False
        self._is_finished = self._is_stream = False
        self._rays_status: int | None = None
        self._rays_words = b""

    async def send(self, message: Message) -> None:
        """Pass a message on, unless it is an error in Ray's own words."""
        if message["type"] == "http.response.start":
            types = [value for name, value in message["headers"] if name == b"content-type"]
            self._is_stream = any(value.startswith(b"text/event-stream") for value in types)
            # Ours are JSON. Those under /-/ are for Ray's users, who know them.
            is_plain = any(value.startswith(b"text/plain") for value in types)
            if message["status"] >= 400 and is_plain and not self._path.startswith("/-/"):
                self._rays_status = message["status"]
                return
            self.is_started = True
            await self._start(message)
            return
        if message["type"] == "http.response.body":
            if self._rays_status is not None:
                self._rays_words += message.get("body", b"")
                return
            if not await self._has_copied():
                return
            self._is_finished = not message.get("more_body", False)
        await self._send(message)

    async def _start(self, message: Message) -> None:
        """Send the head; then, if the replica took the short way, what comes by it."""
        headers = [(name, value) for name, value in message["headers"] if name != HEADER]
        is_relayed = len(headers) < len(message["headers"])
        await self._send({**message, "headers": headers} if is_relayed else message)
        if is_relayed and self._incoming is not None:
            self._copying = asyncio.create_task(self._incoming.copy_to(self._send))

    async def _has_copied(self) -> bool:
        """Wait until all that comes by the short way is sent; say whether it came whole."""
        if self._copying is None or self._incoming is None:
            return True
        await self._incoming.end_within(RELAY_LAG_S)
        await self._copying
        return self._incoming.is_whole

    async def what_is_missing(self) -> RequestError | None:
        """Return the error that an unfinished response should end with."""
        if self._rays_status is not None:
            words = " ".join(self._rays_words.decode(errors="replace").split())
            return RequestError(words or "the server cannot answer.", status=self._rays_status)
        if not self.is_started or (self._is_stream and not self._is_finished):
            await self._has_copied()
            return RequestError(
                "the server lost the process that worked on this request; send it again.",
                code="unavailable",
                status=503,
                retry_after_s=1,
            )
        return None

    def stop(self) -> None:
        """Send nothing more."""
        if self._copying is not None:
            self._copying.cancel()


def _without_orders(scope: Scope) -> Scope:
    """Return the scope without the headers that Ray obeys, and without what it cannot read."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name.lower().replace(b"_", b"-") not in {*RAYS_OWN_HEADERS, HEADER}
        and not (name.lower() == b"x-request-id" and not value.isascii())
    ]
    return {**scope, "headers": headers}


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body in one piece, then what comes after it."""
    is_given = False

    async def whole() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return whole
