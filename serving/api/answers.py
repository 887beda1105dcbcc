"""Run the generation requests of one HTTP request and format the answers, for every endpoint."""

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response

from ...errors import RequestError
from ...moe.adapters.adapter import Adapter
from ..engine.admission import Admission
from ..engine.engine import Engine
from ..engine.sequence import GenerationEvent, GenerationRequest
from ..engine.thread import EngineThread
from ..relay.sender import RelayedStream
from .adapters import ServedModels
from .answer_stream import AnswerStream
from .chunks import Chunks, ChunkWording
from .outlets import Answer, PlainChunks, WholeAnswers
from .protocol import GenerationOptions
from .responses import DONE, error_object, sse

log = logging.getLogger(__name__)


class Wording(ChunkWording, Protocol):
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
        return AnswerStream(partial(self._stream, wording, requests, body), places.pop_all())

    async def _whole(
        self, wording: Wording, requests: list[GenerationRequest], body: GenerationOptions
    ) -> dict[str, Any]:
        """Run all requests to their end and return one object."""
        answers = [Answer() for _ in requests]
        outlet = WholeAnswers(answers)
        async with aclosing(self._thread.generate(requests, outlet)) as batches:
            async for events in batches:
                for index, event in events:
                    if event.error is not None:
                        raise event.error
                    answers[index].add(event)
        choices = [wording.whole(index, answer) for index, answer in enumerate(answers)]
        usage = _usage(
            requests, [a.num_tokens for a in answers], [a.cached_tokens for a in answers]
        )
        head = _head(wording.id_prefix, wording.whole_object, body.model, choices)
        return {**head, "usage": usage}

    async def _stream(
        self,
        wording: Wording,
        requests: list[GenerationRequest],
        body: GenerationOptions,
        way: RelayedStream | None,
    ) -> AsyncGenerator[bytes]:
        """Yield server-sent events: one per piece, then usage if asked, then [DONE].

        Events that wait when the last ones have been sent leave together. Those that differ in
        their text alone leave by the short way, if there is one, and are not yielded. A failure
        ends the stream with an error event, never silently.
        """
        head = _head(wording.id_prefix, wording.chunk_object, body.model, [])
        chunks = Chunks(head, wording)
        generated, cached = [0] * len(requests), [0] * len(requests)

        def usage_of(index: int) -> dict[str, Any] | None:
            if not body.has_continuous_usage:
                return None
            return _usage([requests[index]], [generated[index]], [cached[index]])

        try:
            openings = [(i, wording.first(i)) for i in range(len(requests))]
            opening = [chunks.choice(c, usage_of(i)) for i, c in openings if c is not None]
            if opening:
                yield b"".join(opening)
            is_plain = wording.is_plain and not body.has_continuous_usage
            outlet = None if way is None or not is_plain else PlainChunks(chunks, way)
            async with aclosing(self._thread.generate(requests, outlet)) as batches:
                async for events in batches:
                    pieces = []
                    failure = None
                    for index, event in events:
                        failure = event.error
                        if failure is not None:
                            break
                        generated[index], cached[index] = event.num_tokens, event.cached_tokens
                        if event.text or event.logprobs or event.finish_reason is not None:
                            pieces.append(chunks.event(index, event, usage_of(index)))
                    if pieces:
                        yield b"".join(pieces)
                    if failure is not None:
                        raise failure
            if body.includes_usage:
                yield sse({**head, "usage": _usage(requests, generated, cached)})
        except RequestError as error:
            yield sse(error_object(error))
        except Exception as error:  # the status is sent already, so the event must tell
            log.error("a stream failed", exc_info=error)
            told = RequestError("the server failed; its log has the details.", status=500)
            yield sse(error_object(told))
        yield DONE


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
