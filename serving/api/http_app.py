"""The HTTP face of a server: OpenAI's routes, health and metrics. Needs no Ray."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import RequestError
from ..engine.admission import RETRY_WHEN_DRAINING_S, Admission
from ..engine.sequence import GenerationRequest
from ..engine.thread import EngineThread
from ..engine.tokenizer import ServingTokenizer
from .answers import Answers, Wording
from .chat import ChatWording, prepare_chat
from .chat_request import ChatRequest, parse_chat
from .completion_request import CompletionRequest, parse_completion
from .completions import CompletionWording, prepare_completion
from .gate import Gate
from .request_body import read_body
from .responses import RETRY_AFTER_S, error_response

log = logging.getLogger(__name__)


class HttpApi:
    """The endpoints of one engine."""

    def __init__(
        self,
        thread: EngineThread,
        tokenizer: ServingTokenizer,
        admission: Admission,
        model_name: str,
        render_metrics: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._thread = thread
        self._engine = thread.engine
        self._tokenizer = tokenizer
        self._admission = admission
        self._model_name = model_name
        self._render_metrics = render_metrics
        self._answers = Answers(thread, model_name)

    def app(self, api_key: str | None) -> ASGIApp:
        """Return the ASGI application."""
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.create_completion, methods=["POST"]),
            Route("/v1/chat/completions", self.create_chat, methods=["POST"]),
        ]
        handlers: Any = {
            RequestError: _answer_request_error,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_bug,
        }
        return Gate(Starlette(routes=routes, exception_handlers=handlers), api_key)

    async def health(self, _: Request) -> Response:
        """Say whether requests are served; 503 with a reason when they are not."""
        problem = self._thread.problem()
        if problem is not None:
            return _not_healthy("failed", problem, RETRY_AFTER_S)
        if self._admission.is_draining:
            return _not_healthy("draining", "the server is shutting down", RETRY_WHEN_DRAINING_S)
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        """Return what Prometheus reads."""
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(await self._render_metrics(), media_type=media_type)

    async def models(self, _: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def one_model(self, request: Request) -> Response:
        """Describe the model."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_object())

    async def create_completion(self, request: Request) -> Response:
        """Continue text."""
        body = parse_completion(await read_body(request.receive))
        self._check_model(body.model)
        wording = CompletionWording(body, self._tokenizer)
        return await self._answer(
            body, wording, lambda: prepare_completion(body, self._tokenizer, self._engine)
        )

    async def create_chat(self, request: Request) -> Response:
        """Answer a conversation."""
        body = parse_chat(await read_body(request.receive))
        self._check_model(body.model)
        wording = ChatWording(body, self._tokenizer)
        return await self._answer(
            body, wording, lambda: prepare_chat(body, self._tokenizer, self._engine)
        )

    async def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        wording: Wording,
        prepare: Callable[[], Awaitable[list[GenerationRequest]]],
    ) -> Response:
        """Take places, then do the work; places are held until the response has been sent."""
        with ExitStack() as held:
            held.enter_context(self._admission.places(body.num_answers))
            requests = await prepare()
            if not body.stream:
                return JSONResponse(await self._answers.whole(wording, requests))
            events = self._answers.stream(wording, requests, body.includes_usage)
            response = StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
            return HeldResponse(response, held.pop_all())

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise RequestError(
                f"model {name!r} does not exist; this server has {self._model_name!r}.",
                param="model",
                code="model_not_found",
                status=404,
            )

    def _model_object(self) -> dict[str, object]:
        return {
            "id": self._model_name,
            "object": "model",
            "created": 0,
            "owned_by": "moeyard",
            "max_model_len": self._engine.max_model_len,
        }


class HeldResponse(Response):
    """A response with something to let go of when it has been sent, or never will be."""

    def __init__(self, response: Response, held: ExitStack) -> None:
        self._response = response
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, then let go."""
        with self._held:
            await self._response(scope, receive, send)


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


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client left while it was sending


async def _answer_bug(_: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error)
    return error_response(RequestError("the server failed; its log has the details.", status=500))
