"""Runs inside Ray Serve's HTTP proxy, around its application.

The guard passes a request on to a replica only when it is complete. Ray counts it there from its
first byte, and a replica takes a limited number. So incomplete requests would shut out all others.
Deadlines and limits: ``request_body.py`` for bodies, ``connections.py`` for everything that happens
outside an application. Of a request that is complete, the guard refuses what replicas have just had
no place for (``proxy/backpressure.py``), and names its beginnings where a router wants them
(``proxy/beginnings.py``).

When a replica dies, Ray's proxy drops the connection in the middle of a stream, and answers a
request that had no response yet with a bare 500. Only the proxy outlives the replica, so the
event that tells the client is added here. A stream costs one more function call per message and no
hop through another process. Ray loads this file if :data:`CALLBACK_VARIABLE` names it in the
environment of the process that starts Ray.
"""

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
from .proxy.backpressure import REFUSED, Backpressure
from .proxy.beginnings import HEADER, Wish, name_beginnings

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "moeyard.serving.proxy_guard:middlewares"
UNFINISHED = "/-/unfinished"
"""Answers those who have Ray's token: how many responses are on their way to clients."""
RAYS_OWN_HEADERS = frozenset(
    {
        b"serve-multiplexed-model-id",
        b"x-request-disconnect-disabled",
        b"x-request-timeout-seconds",
        HEADER,
        REFUSED,
    }
)
"""Ray obeys these from any client: they keep a request going after its client has left, set a
time limit, or name a replica. The last one is the guard's word to a replica."""


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
        self._backpressure = Backpressure()
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
                await self._admit(scope, body, receive, send)
        finally:
            if connection is not None:
                connection.enter("idle")

    async def _admit(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Pass a whole request on, unless replicas are full."""
        path = scope["path"]
        try:
            self._backpressure.check(path)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        own = [(REFUSED, b"%d" % count)] if (count := self._backpressure.take_refused(path)) else []
        if Wish.is_there and (names := name_beginnings(body)):
            own.append((HEADER, names.encode()))
        scope = _without_orders(scope)
        scope["headers"] += own
        response = _Watched(path, send)
        try:
            await self._pass_on(scope, _again(body, receive), response)
        finally:
            # Where several answers were too many, one may still find a place.
            if response.status != 429 or b'"n"' not in body:
                self._backpressure.hear(path, response.status)

    async def _pass_on(self, scope: Scope, receive: Receive, response: "_Watched") -> None:
        send = response.unwatched
        self._num_open += 1
        try:
            await self._app(scope, receive, response.send)
            error = response.what_is_missing()
            if error is None:
                return
            if response.is_started:
                end = sse(error_object(error)) + DONE
                await send({"type": "http.response.body", "body": end})
            else:
                await error_response(error)(scope, receive, send)
        finally:
            self._num_open -= 1

    def _has_token(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._expected is not None and hmac.compare_digest(given, self._expected)


class _Watched:
    """A response on its way, and what it lacks."""

    def __init__(self, path: str, send: Send) -> None:
        self._path, self.unwatched = path, send
        self.is_started = False
        self.status: int | None = None
        """What the application has answered with, if it has."""
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
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            if self._rays_status is not None:
                self._rays_words += message.get("body", b"")
                return
            self._is_finished = not message.get("more_body", False)
        await self.unwatched(message)

    def what_is_missing(self) -> RequestError | None:
        """Return the error that an unfinished response should end with."""
        if self._rays_status is not None:
            words = " ".join(self._rays_words.decode(errors="replace").split())
            return RequestError(words or "the server cannot answer.", status=self._rays_status)
        if not self.is_started or (self._is_stream and not self._is_finished):
            return RequestError(
                "the server lost the process that worked on this request; send it again.",
                code="unavailable",
                status=503,
                retry_after_s=1,
            )
        return None


def _without_orders(scope: Scope) -> Scope:
    """Return the scope without the headers that Ray obeys, and without what it cannot read."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name.lower().replace(b"_", b"-") not in RAYS_OWN_HEADERS
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
