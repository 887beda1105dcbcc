"""Runs inside Ray Serve's HTTP proxy: what a dead replica leaves unfinished ends in an error.

When a replica dies, Ray's proxy drops the connection in the middle of a stream, and answers a
request that had no response yet with a bare 500. Only the proxy outlives the replica, so the
event that tells the client is added there; a stream costs one more function call per message and
no hop through another process. Ray loads this where :data:`CALLBACK_VARIABLE` names it in the
environment of the process that starts Ray.
"""

import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from .responses import DONE, error_object, error_response, sse

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "moeyard.serving.proxy_guard:middlewares"


def middlewares() -> list[Middleware]:
    """Return what Ray's proxy puts around its application."""
    return [Middleware(ProxyGuard)]


def ask_for_guard() -> None:
    """Have every Ray that this process starts from now on use the guard."""
    os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)


class ProxyGuard:
    """Finish responses that the application behind it did not finish."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and see that its response ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_started = is_finished = is_stream = False

        async def watch(message: Message) -> None:
            nonlocal is_started, is_finished, is_stream
            if message["type"] == "http.response.start":
                is_started = True
                types = [value for name, value in message["headers"] if name == b"content-type"]
                is_stream = any(value.startswith(b"text/event-stream") for value in types)
            elif message["type"] == "http.response.body":
                is_finished = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watch)
        if not is_started:
            await error_response(_lost())(scope, receive, send)
        elif is_stream and not is_finished:
            await send({"type": "http.response.body", "body": sse(error_object(_lost())) + DONE})


def _lost() -> RequestError:
    return RequestError(
        "the server lost the process that worked on this request; send it again.",
        code="unavailable",
        status=503,
        retry_after_s=1,
    )
