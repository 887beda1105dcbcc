"""Run the generation requests of one HTTP request and format the answers, for every endpoint."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import RequestError
from ...moe.adapters.adapter import Adapter
from ..engine.admission import Admission
from ..engine.engine import Engine
from ..engine.logprobs import TokenLogprob
from ..engine.sequence import GenerationEvent, GenerationRequest
from ..engine.thread import EngineThread
from .adapters import ServedModels
from .protocol import GenerationOptions
from .responses import DONE, error_object, sse

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Answer:
    """One answer, as generated so far."""

    text: str = ""
    finish_reason: str | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    cached_tokens: int = 0

    def add(self, event: GenerationEvent) -> None:
        """Add an event."""
        self.text += event.text
        self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason
        self.stop_token = event.stop_token
        self.num_tokens = event.num_tokens
        self.cached_tokens = event.cached_tokens


class Wording(Protocol):
    """How an endpoint formats answers; one per HTTP request, so it may keep state."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the choice of a finished answer."""
        ...

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the choice that opens an answer's stream, if there is one."""
        ...

    def chunk(self, index: int, event: GenerationEvent) -> dict[str, Any]:
        """Return the choice that carries one event."""
        ...


class Answers:
    """The answers of one engine."""

    def __init__(self, thread: EngineThread, admission: Admission, models: ServedModels) -> None:
        self.engine: Engine = thread.engine
        self._thread = thread
        self._admission = admission
        self.models = models

    def places(self, count: int) -> ExitStack:
        """Take places for ``count`` answers; raise :class:`RequestError` if there are none.

        Leaving the returned context gives them back, unless :meth:`respond` holds them until a
        stream has been sent.
        """
        held = ExitStack()
        held.enter_context(self._admission.places(count))
        return held

    async def respond(
        self,
        body: GenerationOptions,
        wording: Wording,
        requests: list[GenerationRequest],
        places: ExitStack,
        adapter: Adapter | None,
    ) -> Response:
        """Run the requests with the adapter of ``body.model``; answer with one object, or with a
        stream if ``body`` asks for it."""
        requests = [replace(request, adapter=adapter) for request in requests]
        if not body.stream:
            return JSONResponse(await self._whole(wording, requests, body))
        events = self._stream(wording, requests, body)
        response = StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        return HeldResponse(response, places.pop_all())

    async def _whole(
        self, wording: Wording, requests: list[GenerationRequest], body: GenerationOptions
    ) -> dict[str, Any]:
        """Run all requests to their end and return one object."""
        answers = [Answer() for _ in requests]
        async with aclosing(self._run(requests)) as events:
            async for index, event in events:
                answers[index].add(event)
        choices = [wording.whole(index, answer) for index, answer in enumerate(answers)]
        usage = _usage(
            requests, [a.num_tokens for a in answers], [a.cached_tokens for a in answers]
        )
        head = _head(wording.id_prefix, wording.whole_object, body.model, choices)
        return {**head, "usage": usage}

    async def _stream(
        self, wording: Wording, requests: list[GenerationRequest], body: GenerationOptions
    ) -> AsyncGenerator[bytes]:
        """Yield server-sent events: one per piece, then usage if asked, then [DONE].

        A failure ends the stream with an error event, never silently.
        """
        head = _head(wording.id_prefix, wording.chunk_object, body.model, [])
        generated, cached = [0] * len(requests), [0] * len(requests)

        def piece(index: int, choice: dict[str, Any]) -> bytes:
            usage = {}
            if body.has_continuous_usage:
                usage = {"usage": _usage([requests[index]], [generated[index]], [cached[index]])}
            return sse({**head, "choices": [choice], **usage})

        try:
            for index in range(len(requests)):
                opening = wording.first(index)
                if opening is not None:
                    yield piece(index, opening)
            async with aclosing(self._run(requests)) as events:
                async for index, event in events:
                    generated[index], cached[index] = event.num_tokens, event.cached_tokens
                    if event.text or event.logprobs or event.finish_reason is not None:
                        yield piece(index, wording.chunk(index, event))
            if body.includes_usage:
                yield sse({**head, "usage": _usage(requests, generated, cached)})
        except RequestError as error:
            yield sse(error_object(error))
        except Exception as error:  # the status is sent already, so the event must tell
            log.error("a stream failed", exc_info=error)
            failure = RequestError("the server failed; its log has the details.", status=500)
            yield sse(error_object(failure))
        yield DONE

    async def _run(
        self, requests: list[GenerationRequest]
    ) -> AsyncGenerator[tuple[int, GenerationEvent]]:
        """Run requests concurrently and yield (index, event) as they come.

        Raises :class:`RequestError` when one of them fails; leaving early cancels all of them.
        """
        merged: asyncio.Queue[tuple[int, GenerationEvent] | Exception] = asyncio.Queue()

        async def pump(index: int, request: GenerationRequest) -> None:
            try:
                async with aclosing(self._thread.generate(request)) as events:
                    async for event in events:
                        merged.put_nowait((index, event))
            except Exception as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(pump(i, request)) for i, request in enumerate(requests)]
        try:
            unfinished = len(requests)
            while unfinished:
                item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item[1].error is not None:
                    raise item[1].error
                unfinished -= item[1].finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _head(prefix: str, kind: str, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
    }


def ending(part: Answer | GenerationEvent) -> dict[str, Any]:
    """Return why an answer ended; ``stop_reason``, as in vLLM, is the stop token that ended it."""
    reason: dict[str, Any] = {"finish_reason": part.finish_reason}
    if part.stop_token is not None:
        reason["stop_reason"] = part.stop_token
    return reason


class HeldResponse(Response):
    """A response that releases resources when it has been sent or has failed."""

    def __init__(self, response: Response, held: ExitStack) -> None:
        self._response = response
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, then release the resources."""
        with self._held:
            await self._response(scope, receive, send)


def _usage(
    requests: list[GenerationRequest], generated: list[int], cached: list[int]
) -> dict[str, Any]:
    # Answers to the same prompt share its tokens, as OpenAI counts them. One of them read it first.
    prompts = {id(request.prompt_ids): len(request.prompt_ids) for request in requests}
    prompt_tokens = sum(prompts.values())
    reused: dict[int, int] = {}
    for request, count in zip(requests, cached, strict=True):
        prompt = id(request.prompt_ids)
        reused[prompt] = min(count, reused.get(prompt, count))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sum(generated),
        "total_tokens": prompt_tokens + sum(generated),
        "prompt_tokens_details": {"cached_tokens": sum(reused.values())},
    }
