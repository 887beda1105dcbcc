"""``POST /v1/chat/completions``: parse the body, make requests, format OpenAI's objects."""

import asyncio
from collections.abc import Iterable
from typing import Any

from pydantic import Field, StrictBool, StrictInt
from starlette.requests import Request
from starlette.responses import Response

from ...errors import RequestError
from ..engine.engine import Engine
from ..engine.logprobs import TokenLogprob
from ..engine.sequence import GenerationEvent, GenerationRequest
from ..engine.tokenizer import ServingTokenizer
from .answers import Answers, ending
from .messages import read_messages
from .outlets import Answer
from .protocol import (
    MAX_LOGPROBS,
    GenerationOptions,
    choices_of,
    read_values,
    sampling_of,
    validate,
)
from .request_body import read_body
from .tool_messages import check_written
from .tools import drop_tools

UNSUPPORTED: dict[str, Any] = {
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "logit_bias": {},
}


class ChatRequest(GenerationOptions):
    """A conversation to answer."""

    messages: Any
    """As :func:`read_messages` returns them."""
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1)
    """The newer name of ``max_tokens``. Without either, an answer may fill the model's context."""
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_answers(self) -> int:
        """Choices that the answer will have."""
        return self.n

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens; None for as much as fits."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token, or None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatEndpoint:
    """``POST /v1/chat/completions``."""

    def __init__(self, answers: Answers, tokenizer: ServingTokenizer) -> None:
        self._answers = answers
        self._tokenizer = tokenizer

    async def create(self, request: Request) -> Response:
        """Answer a conversation."""
        body = parse_chat(await read_body(request.receive))
        adapter = self._answers.models.find(body.model)
        with self._answers.places(body.num_answers) as places:
            requests = await prepare_chat(body, self._tokenizer, self._answers.engine)
            wording = ChatWording(body, self._tokenizer)
            return await self._answers.respond(body, wording, requests, places, adapter)


def parse_chat(body: bytes) -> ChatRequest:
    """Read a request body; every problem is a :class:`RequestError`."""
    values = read_values(body, UNSUPPORTED)
    drop_tools(values)
    if "messages" in values:
        values["messages"] = read_messages(values["messages"])
    request = validate(ChatRequest, values)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs = true.", param="top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise RequestError(
            f"max_tokens is {request.max_tokens} and max_completion_tokens "
            f"{request.max_completion_tokens}; give one of them.",
            param="max_completion_tokens",
        )
    return request


async def prepare_chat(
    body: ChatRequest, tokenizer: ServingTokenizer, engine: Engine
) -> list[GenerationRequest]:
    """Return one generation request per answer; all are checked before any runs."""
    check_written(body.messages, tokenizer.tools)
    loop = asyncio.get_running_loop()
    text = await loop.run_in_executor(tokenizer.rendering, tokenizer.render_chat, body.messages)
    return await asyncio.to_thread(_chat_requests, body, text, tokenizer, engine)


def _chat_requests(
    body: ChatRequest, text: str, tokenizer: ServingTokenizer, engine: Engine
) -> list[GenerationRequest]:
    """Tokenise and check; for a thread, since a long prompt takes as long as many tokens."""
    prompt_ids = tuple(tokenizer.encode_rendered(text))
    request = GenerationRequest(
        request_id="",
        prompt_ids=prompt_ids,
        max_tokens=body.limit or max(1, engine.max_model_len - len(prompt_ids)),
        sampling=sampling_of(body, engine.sampling),
        stop=body.stop_strings(),
        stop_token_ids=frozenset(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        num_logprobs=body.num_logprobs,
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    try:
        engine.check(request)
    except RequestError as error:
        error.param = "messages" if error.param == "prompt" else error.param
        raise
    return choices_of(request, body)


class ChatWording:
    """OpenAI's chat objects."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, tokenizer: ServingTokenizer) -> None:
        self._with_logprobs = body.logprobs
        self._tokenizer = tokenizer

    @property
    def is_plain(self) -> bool:
        """Whether chunks differ in nothing but their text while an answer goes on."""
        return not self._with_logprobs

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the choice that names the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the choice of a finished answer."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            **ending(answer),
        }

    def chunk(self, index: int, event: GenerationEvent) -> dict[str, Any]:
        """Return the choice that carries one event."""
        return {
            "index": index,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._logprobs(event.logprobs),
            **ending(event),
        }

    def _logprobs(self, scores: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._token(score.token, score.logprob),
                "top_logprobs": [self._token(token, value) for token, value in score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        name, spelled = self._tokenizer.token_name(token), self._tokenizer.token_bytes(token)
        return {"token": name, "logprob": logprob, "bytes": list(spelled)}
