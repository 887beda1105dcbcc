"""``/v1/completions``: from a body to generation requests, and answers in OpenAI's words."""

import asyncio
import codecs
import uuid
from dataclasses import replace
from typing import Any

from ...moe.models.sampling import SamplingParams
from ..engine.engine import Engine
from ..engine.logprobs import TokenLogprob
from ..engine.sequence import GenerationEvent, GenerationRequest
from ..engine.tokenizer import ServingTokenizer
from .answers import Answer
from .completion_request import CompletionRequest
from .protocol import GenerationOptions


def sampling_of(body: GenerationOptions, usual: SamplingParams) -> SamplingParams:
    """Return how a request wants its tokens drawn; what it leaves open is as ``usual``."""
    given = body.model_dump(include={"temperature", "top_p", "top_k"}, exclude_unset=True)
    return replace(usual, **given)


def seed_of(body: GenerationOptions, choice: int) -> int | None:
    """Return the seed of one of a request's answers; they differ."""
    return None if body.seed is None else (body.seed + choice) % (1 << 63)


async def prepare_completion(
    body: CompletionRequest, tokenizer: ServingTokenizer, engine: Engine
) -> list[GenerationRequest]:
    """Return one generation request per answer; all are checked before any runs."""
    requests: list[GenerationRequest] = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            prompt_ids = tuple(await asyncio.to_thread(tokenizer.encode, prompt))
        else:
            prompt_ids = tuple(prompt)
        first = len(requests)
        for choice in range(body.n):
            request = GenerationRequest(
                request_id=uuid.uuid4().hex,
                prompt_ids=prompt_ids,
                max_tokens=body.max_tokens,
                sampling=sampling_of(body, engine.sampling),
                seed=seed_of(body, choice),
                stop=body.stop_strings(),
                num_logprobs=body.logprobs,
                scores_prompt=body.echo,
            )
            engine.check(request)
            requests.append(request)
        if body.echo:  # ids can be decoded now that they are checked
            echo = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            requests[first:] = [replace(request, echo=echo) for request in requests[first:]]
    return requests


class CompletionWording:
    """OpenAI's completion objects."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest, tokenizer: ServingTokenizer) -> None:
        self._with_logprobs = body.logprobs is not None
        self._tokenizer = tokenizer
        self._offsets: dict[int, TextOffsets] = {}

    def first(self, index: int) -> dict[str, Any] | None:
        """Nothing opens a completion."""
        return None

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the choice of a finished answer."""
        return self._choice(index, answer.text, answer.logprobs, answer.finish_reason)

    def chunk(self, index: int, event: GenerationEvent) -> dict[str, Any]:
        """Return the choice that carries one event."""
        return self._choice(index, event.text, event.logprobs, event.finish_reason)

    def _choice(self, index: int, text: str, scores: Any, reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(index, scores) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, scores: list[TokenLogprob]) -> dict[str, Any]:
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

        OpenAI's format has them by their text, which several ids may share (a letter and its byte);
        the token itself goes by its text, others that would take its place by their id, spelled as
        vLLM does.
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
    """Where each token's text begins, in characters, as tokens come in."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def next(self, spelled: bytes) -> int:
        """Return where a token begins, and go on behind it."""
        start = self._num_characters
        self._num_characters += len(self._decoder.decode(spelled))
        return start
