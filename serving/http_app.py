"""The HTTP face of a server: OpenAI's routes, health and metrics. Needs no Ray."""

import hmac
import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import RequestError
from .completions import Completions, error_object
from .protocol import parse_completion

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
OPEN_PATHS = frozenset({"/health"})
"""Answered without a key; everything else, known or unknown, needs one."""


def create_app(completions: Completions, api_key: str | None) -> ASGIApp:
    """Return the ASGI application."""
    thread = completions.thread

    async def health(_: Request) -> Response:
        problem = thread.problem()
        if problem is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", "reason": problem}, status_code=503)

    async def metrics(_: Request) -> Response:
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(thread.engine.metrics.render(), media_type=media_type)

    def model_object() -> dict[str, object]:
        return {
            "id": completions.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "moeyard",
            "max_model_len": thread.engine.max_model_len,
        }

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_object()]})

    async def one_model(request: Request) -> Response:
        completions.check_model(request.path_params["name"])
        return JSONResponse(model_object())

    async def create_completion(request: Request) -> Response:
        body = parse_completion(await read_body(request))
        requests = await completions.prepare(body)
        if not body.stream:
            return JSONResponse(await completions.complete(requests))
        options = body.stream_options
        events = completions.stream(requests, options is not None and options.include_usage)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/completions", create_completion, methods=["POST"]),
        ],
        exception_handlers={
            RequestError: _answer_request_error,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_bug,
        },
    )
    return app if api_key is None else RequireKey(app, api_key)


async def read_body(request: Request) -> bytes:
    """Read the body, at most :data:`MAX_BODY_BYTES`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(
                f"the body is larger than {MAX_BODY_BYTES} bytes; send a shorter prompt.",
                status=413,
            )
    return bytes(body)


class RequireKey:
    """Refuse every request without ``Authorization: Bearer KEY``, before it is looked at."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let requests with the key, and those to open paths, through."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        error = RequestError(
            "the API key is missing or wrong; send Authorization: Bearer KEY.",
            code="invalid_api_key",
            status=401,
        )
        response = JSONResponse(
            error_object(error), status_code=401, headers={"WWW-Authenticate": "Bearer"}
        )
        await response(scope, receive, send)


async def _answer_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error_object(error), status_code=error.status)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is not offered; see /v1/models."
    described = RequestError(message, status=error.status_code)
    return JSONResponse(
        error_object(described), status_code=error.status_code, headers=error.headers
    )


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client left while it was sending


async def _answer_bug(_: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error)
    described = RequestError("the server failed; its log has the details.", status=500)
    return JSONResponse(error_object(described), status_code=500)
