"""What the HTTP application of every kind of model has around its routes. Needs no Ray."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ...errors import RequestError
from ..engine.admission import RETRY_WHEN_DRAINING_S, Admission
from .cors import with_cors
from .gate import Gate
from .refusals import CountRefusals
from .responses import RETRY_AFTER_S, error_response

log = logging.getLogger(__name__)


class Frame:
    """Health, metrics, the gate, and errors as sentences.

    ``problem`` says why requests cannot be answered, or None.
    """

    def __init__(
        self,
        problem: Callable[[], str | None],
        admission: Admission,
        render_metrics: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._problem = problem
        self._admission = admission
        self._render_metrics = render_metrics

    def app(
        self, routes: Sequence[Route], api_key: str | None, cors_origins: Sequence[str] = ()
    ) -> ASGIApp:
        """Return the ASGI application with ``routes`` and those that every server has.

        Pages of ``cors_origins`` may call it from a browser.
        """
        own = [Route("/health", self.health), Route("/metrics", self.metrics)]
        handlers: Any = {
            RequestError: _answer_request_error,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_one_who_left,
            Exception: _answer_bug,
        }
        app: ASGIApp = Gate(Starlette(routes=[*own, *routes], exception_handlers=handlers), api_key)
        app = CountRefusals(app, self._admission.rejected)
        # Outside the gate: browsers ask for permission without a key.
        return with_cors(app, cors_origins)

    async def health(self, _: Request) -> Response:
        """Say whether requests are served; 503 with a reason when they are not."""
        problem = self._problem()
        if problem is not None:
            return _not_healthy("failed", problem, RETRY_AFTER_S)
        if self._admission.is_draining:
            return _not_healthy("draining", "the server is shutting down", RETRY_WHEN_DRAINING_S)
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        """Return what Prometheus reads."""
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(await self._render_metrics(), media_type=media_type)


def _not_healthy(status: str, reason: str, retry_after_s: int) -> Response:
    headers = {"Retry-After": str(retry_after_s)}
    return JSONResponse({"status": status, "reason": reason}, status_code=503, headers=headers)


async def _answer_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is not offered; see /v1/models."
    response = error_response(RequestError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


async def _answer_one_who_left(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client left while it was sending


async def _answer_bug(_: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error)
    return error_response(RequestError("the server failed; its log has the details.", status=500))
