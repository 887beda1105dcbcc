"""``POST /v1/completions``: parse the body, make requests, format OpenAI's objects."""

import asyncio
import codecs
from collections.abc import Iterable
from dataclasses import replace
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
from .outlets import Answer
from .protocol import (
    MAX_LOGPROBS,
    GenerationOptions,
    check_unicode,
    choices_of,
    read_values,
    sampling_of,
    validate,
)
from .request_body import read_body

UNSUPPORTED: dict[str, Any] = {"suffix": "", "best_of": 1, "logit_bias": {}}


class CompletionRequest(GenerationOptions):
    """Text to continue."""

    prompt: Any
    """A string, a list of strings, a list of token ids or a list of such lists."""
    max_tokens: StrictInt = Field(default=16, ge=0)
    """0 only with ``echo``: the prompt and its log-probabilities, and no answer."""
    echo: StrictBool = False
    """Answer with the prompt in front."""
    logprobs: StrictInt | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Report log-probabilities of each token and of this many likeliest ones."""

    @property
    def num_answers(self) -> int:
        """Choices that the answer will have."""
        return len(self.prompts()) * self.n

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, as text or as ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class CompletionEndpoint:
    """``POST /v1/completions``."""

    def __init__(self, answers: Answers, tokenizer: ServingTokenizer) -> None:
        self._answers = answers
        self._tokenizer = tokenizer

    async def create(self, request: Request) -> Response:
        """Continue text."""
        body = parse_completion(await read_body(request.receive))
        adapter = self._answers.models.find(body.model)
        with self._answers.places(body.num_answers) as places:
            requests = await prepare_completion(body, self._tokenizer, self._answers.engine)
            wording = CompletionWording(body, self._tokenizer)
            return await self._answers.respond(body, wording, requests, places, adapter)


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a request body; every problem is a :class:`RequestError`."""
    values = read_values(body, UNSUPPORTED)
    _check_prompt(values.get("prompt"))
    request = validate(CompletionRequest, values)
    check_unicode("prompt", (p for p in request.prompts() if isinstance(p, str)))
    if request.max_tokens == 0 and not request.echo:
        raise RequestError(
            "max_tokens is 0, which needs echo = true; ask for at least one token.",
            param="max_tokens",
        )
    return request


def _check_prompt(prompt: Any) -> None:
    """Check the type by hand, stopping at the first element that is wrong.

    A union of list types would make pydantic describe every element of a long list, per type.
    """
    if prompt is None or isinstance(prompt, str):
        return  # a missing prompt is found by the model
    if isinstance(prompt, list) and not prompt:
        raise RequestError("prompt is an empty list; give at least one prompt.", param="prompt")
    if isinstance(prompt, list) and (
        all(isinstance(row, str) for row in prompt)
        or _are_ids(prompt)
        or all(isinstance(row, list) and _are_ids(row) for row in prompt)
    ):
        return
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of such lists.",
        param="prompt",
    )


def _are_ids(row: list[Any]) -> bool:
    return all(type(token) is int for token in row)


async def prepare_completion(
    body: CompletionRequest, tokenizer: ServingTokenizer, engine: Engine
) -> list[GenerationRequest]:
    """Return one generation request per answer; all are checked before any runs."""
    requests: list[GenerationRequest] = []
    for prompt in body.prompts():
        requests += await asyncio.to_thread(_requests_for, body, prompt, tokenizer, engine)
    return requests


def _requests_for(
    body: CompletionRequest, prompt: str | list[int], tokenizer: ServingTokenizer, engine: Engine
) -> list[GenerationRequest]:
    """Tokenise and check; for a thread, since a long prompt takes as long as many tokens."""
    request = GenerationRequest(
        request_id="",
        prompt_ids=tuple(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt),
        max_tokens=body.max_tokens,
        sampling=sampling_of(body, engine.sampling),
        stop=body.stop_strings(),
        stop_token_ids=frozenset(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        num_logprobs=body.logprobs,
        scores_prompt=body.echo,
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    engine.check(request)
    if body.echo:  # ids can be decoded now that they are checked
        echo = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        request = replace(request, echo=echo)
    return choices_of(request, body)


class CompletionWording:
    """OpenAI's completion objects."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest, tokenizer: ServingTokenizer) -> None:
        self._with_logprobs = body.logprobs is not None
        self._tokenizer = tokenizer
        self._offsets: dict[int, TextOffsets] = {}

    @property
    def is_plain(self) -> bool:
        """Whether chunks differ in nothing but their text while an answer goes on."""
        return not self._with_logprobs

    def first(self, index: int) -> dict[str, Any] | None:
        """Nothing opens a completion."""
        return None

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the choice of a finished answer."""
        return self._choice(index, answer.text, answer)

    def chunk(self, index: int, event: GenerationEvent) -> dict[str, Any]:
        """Return the choice that carries one event."""
        return self._choice(index, event.text, event)

    def _choice(self, index: int, text: str, part: Answer | GenerationEvent) -> dict[str, Any]:
        logprobs = self._logprobs(index, part.logprobs) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, **ending(part)}

    def _logprobs(self, index: int, scores: Iterable[TokenLogprob]) -> dict[str, Any]:
        offsets = self._offsets.setdefault(index, TextOffsets())
        return {
            "tokens": [self._tokenizer.token_name(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._by_name(score) for score in scores],
            "text_offset": [
                offsets.next(self._tokenizer.token_bytes(score.token)) for score in scores
            ],
        }

    def _by_name(self, score: TokenLogprob) -> dict[str, float] | None:
        """Return the likeliest tokens, likeliest first, and always the token itself.

        OpenAI's format keys tokens by their text, but several ids may share a text (a letter and
        its byte). The token itself is keyed by its text; another with a text already taken is keyed
        by its id, spelled as in vLLM.
        """
        if score.logprob is None:
            return None
        own = self._tokenizer.token_name(score.token)
        found: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            name = self._tokenizer.token_name(token)
            if token != score.token and (name == own or name in found):
                name = f"token_id:{token}"
            found[name] = logprob
        return found


class TextOffsets:
    """Where each token's text begins, in characters, computed token by token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def next(self, spelled: bytes) -> int:
        """Return where a token begins, and advance past it."""
        start = self._num_characters
        self._num_characters += len(self._decoder.decode(spelled))
        return start
