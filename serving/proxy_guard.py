"""Runs inside Ray Serve's HTTP proxy, around its application.

The guard passes a request on to a replica only when it is complete. Ray counts it there from its
first byte, and a replica takes a limited number. So incomplete requests would shut out all others.
Deadlines and limits: ``request_body.py`` for bodies, ``connections.py`` for everything that happens
outside an application. Of a request that is complete, the guard takes its places at a replica, or
refuses it where there are none (``proxy/places.py``). Ray's router sends it there.

When a replica dies, Ray's proxy drops the connection in the middle of a stream, and answers a
request that had no response yet with a bare 500. Only the proxy outlives the replica, so the
event that tells the client is added here.

The pieces of a stream do not come through Ray if the replica runs on this machine. It sends them to
a socket of this process (``relay/``), where those of all its streams arrive in one read. Ray still
carries the head of the response and its end, counts the request and cancels it.

Ray loads this file if :data:`CALLBACK_VARIABLE` names it in the environment of the process that
starts Ray.
"""

import hmac
import os
from collections.abc import Callable

import uvicorn.config
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from ..settled import trim_now_and_then
from .api.connections import STATE_KEY, Connection, connections
from .api.cors import with_cors
from .api.request_body import read_body
from .api.responses import DONE, error_object, error_response, sse
from .proxy.applications import applications
from .proxy.beginnings import name_beginnings
from .proxy.held import Held
from .proxy.places import HEADER as TICKET
from .proxy.places import REFUSED, Places, Ticket
from .proxy.wanted import places_of, prefix_of
from .proxy.watched import Watched
from .relay.frames import HEADER as RELAY
from .relay.receiver import Relay

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "moeyard.serving.proxy_guard:middlewares"
UNFINISHED = "/-/unfinished"
"""Answers those who have Ray's token: how many responses are on their way to clients."""
RAYS_OWN_HEADERS = frozenset(
    {
        b"serve-multiplexed-model-id",
        b"x-request-disconnect-disabled",
        b"x-request-timeout-seconds",
        TICKET,
        REFUSED,
        RELAY,
    }
)
"""Ray obeys these from any client: they keep a request going after its client has left, set a
time limit, or name a replica. The last three are the guard's words to the router and a replica."""


def middlewares() -> list[Middleware]:
    """Return what Ray's proxy puts around its application."""
    # Ray leaves the protocol to uvicorn, which looks it up here when the server starts.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Connection.__module__}:{Connection.__name__}"
    trim_now_and_then()
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
            await _refuse(error, scope, receive, send)
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
        """Pass a whole request on, unless there is no place for it."""
        path, method, prefix = scope["path"], scope["method"], prefix_of(scope["path"])
        places = applications.nearest(path)
        is_its = places is not None and applications.find(prefix) is places
        try:
            ticket = None
            if places is not None and is_its and method == "POST":
                ticket = _take(places, path, body)
            elif places is not None:
                ticket = places.take(0)  # a replica that tells of it is known to mean this proxy's
        except RequestError as error:
            await _refuse(error, scope, receive, send)
            return
        held = Held(places, ticket, prefix, is_its and method != "OPTIONS")
        try:
            await self._relay_on(scope, held, _again(body, receive, held.has_arrived), send)
        finally:
            held.close()

    async def _relay_on(self, scope: Scope, held: Held, receive: Receive, send: Send) -> None:
        """Pass a request on with the guard's own headers, and offer the short way."""
        incoming = await self._relay.open()
        scope = _without_orders(scope)
        scope["headers"] += held.headers
        if incoming is not None:
            scope["headers"].append((RELAY, incoming.address))
        response = Watched(scope["path"], send, incoming, held)
        try:
            await self._pass_on(scope, held, receive, response)
        finally:
            response.stop()
            if incoming is not None:
                self._relay.close(incoming)

    async def _pass_on(self, scope: Scope, held: Held, receive: Receive, response: Watched) -> None:
        send = response.unwatched
        self._num_open += 1
        try:
            await self._app(scope, receive, response.send)
            held.has_ended()
            error = await response.what_is_missing()
            if error is None:
                return
            if response.is_started:
                end = sse(error_object(error)) + DONE
                await send({"type": "http.response.body", "body": end})
            else:
                await _refuse(error, scope, receive, send)
        finally:
            self._num_open -= 1

    def _has_token(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._expected is not None and hmac.compare_digest(given, self._expected)


def _take(places: Places, path: str, body: bytes) -> Ticket:
    """Take the places that a request wants; raises :class:`RequestError` (429)."""
    beginnings = name_beginnings(body) if places.wants_beginnings else []
    return places.take(places_of(path, body), beginnings)


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error that the pages which may call the application can read."""
    places = applications.find(prefix_of(scope["path"]))
    origins = () if places is None else places.origins
    await with_cors(error_response(error), origins)(scope, receive, send)


def _without_orders(scope: Scope) -> Scope:
    """Return the scope without the headers that Ray obeys, and without what it cannot read."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name.lower().replace(b"_", b"-") not in RAYS_OWN_HEADERS
        and not (name.lower() == b"x-request-id" and not value.isascii())
    ]
    return {**scope, "headers": headers}


def _again(body: bytes, receive: Receive, has_left: Callable[[], None]) -> Receive:
    """Return a ``receive`` that gives the body in one piece, then what comes after it.

    ``has_left`` is called when that is the client's end.
    """
    is_given = False

    async def whole() -> Message:
        nonlocal is_given
        if is_given:
            message = await receive()
            if message["type"] == "http.disconnect":
                has_left()
            return message
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return whole
