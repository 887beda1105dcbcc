"""Answer completion requests: text in, OpenAI's objects out."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from ..errors import RequestError
from ..moe.sampling import SamplingParams
from .engine_thread import EngineThread
from .protocol import CompletionRequest
from .sequence import GenerationEvent, GenerationRequest


class Encode(Protocol):
    """Text to token ids."""

    def __call__(self, text: str) -> list[int]: ...


class Completions:
    """The completion service of one engine."""

    def __init__(self, thread: EngineThread, encode: Encode, model_name: str) -> None:
        self.thread = thread
        self.model_name = model_name
        self._encode = encode

    def check_model(self, name: str) -> None:
        """Raise :class:`RequestError` for a model that is not this one."""
        if name != self.model_name:
            raise RequestError(
                f"model {name!r} does not exist; this server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
                status=404,
            )

    async def prepare(self, body: CompletionRequest) -> list[GenerationRequest]:
        """Turn a body into one generation request per answer; all are checked before any runs."""
        self.check_model(body.model)
        requests = []
        for prompt in body.prompts():
            if isinstance(prompt, str):
                prompt_ids = tuple(await asyncio.to_thread(self._encode, prompt))
            else:
                prompt_ids = tuple(prompt)
            for choice in range(body.n):
                request = GenerationRequest(
                    request_id=uuid.uuid4().hex,
                    prompt_ids=prompt_ids,
                    max_tokens=body.max_tokens,
                    sampling=SamplingParams(body.temperature, body.top_p, body.top_k),
                    seed=None if body.seed is None else (body.seed + choice) % (1 << 63),
                    stop=body.stop_strings(),
                )
                self.thread.engine.check(request)
                requests.append(request)
        return requests

    async def complete(self, requests: list[GenerationRequest]) -> dict[str, Any]:
        """Run all requests to their end and return one completion object."""
        texts = [""] * len(requests)
        reasons: list[str | None] = [None] * len(requests)
        generated = [0] * len(requests)
        async with aclosing(self._run(requests)) as events:
            async for index, event in events:
                texts[index] += event.text
                reasons[index] = event.finish_reason
                generated[index] = event.num_tokens
        choices = [
            _choice(index, text, reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return self._object(_new_id(), choices, _usage(requests, generated))

    async def stream(
        self, requests: list[GenerationRequest], include_usage: bool
    ) -> AsyncGenerator[bytes]:
        """Yield server-sent events: one per piece of text, then usage if asked, then [DONE].

        A failure ends the stream with an error event, never silently.
        """
        completion_id, generated = _new_id(), [0] * len(requests)
        try:
            async with aclosing(self._run(requests)) as events:
                async for index, event in events:
                    generated[index] = event.num_tokens
                    if event.text or event.finish_reason is not None:
                        choice = _choice(index, event.text, event.finish_reason)
                        yield _sse(self._object(completion_id, [choice], None))
            if include_usage:
                yield _sse(self._object(completion_id, [], _usage(requests, generated)))
        except RequestError as error:
            yield _sse(error_object(error))
        yield b"data: [DONE]\n\n"

    async def _run(
        self, requests: list[GenerationRequest]
    ) -> AsyncGenerator[tuple[int, GenerationEvent]]:
        """Run requests side by side and yield (index, event) as they come.

        Raises :class:`RequestError` when one of them fails; leaving early cancels all of them.
        """
        merged: asyncio.Queue[tuple[int, GenerationEvent] | Exception] = asyncio.Queue()

        async def pump(index: int, request: GenerationRequest) -> None:
            try:
                async with aclosing(self.thread.generate(request)) as events:
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
                    raise RequestError(item[1].error, code="unavailable", status=503)
                unfinished -= item[1].finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _object(
        self, completion_id: str, choices: list[dict[str, Any]], usage: dict[str, int] | None
    ) -> dict[str, Any]:
        values: dict[str, Any] = {
            "id": completion_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model_name,
            "choices": choices,
        }
        return values if usage is None else {**values, "usage": usage}


def error_object(error: RequestError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


def _new_id() -> str:
    return f"cmpl-{uuid.uuid4().hex}"


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(requests: list[GenerationRequest], generated: list[int]) -> dict[str, int]:
    # Answers to the same prompt share its tokens, as OpenAI counts them.
    prompts = {id(request.prompt_ids): len(request.prompt_ids) for request in requests}
    prompt_tokens = sum(prompts.values())
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sum(generated),
        "total_tokens": prompt_tokens + sum(generated),
    }


def _sse(values: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(values)}\n\n".encode()
