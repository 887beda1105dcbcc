"""``/v1/chat/completions``: from a body to generation requests, and answers in OpenAI's words."""

import asyncio
import uuid
from collections.abc import Iterable
from typing import Any

from ...errors import RequestError
from ..engine.engine import Engine
from ..engine.logprobs import TokenLogprob
from ..engine.sequence import GenerationEvent, GenerationRequest
from ..engine.tokenizer import ServingTokenizer
from .answers import Answer
from .chat_request import ChatRequest
from .completions import sampling_of, seed_of


async def prepare_chat(
    body: ChatRequest, tokenizer: ServingTokenizer, engine: Engine
) -> list[GenerationRequest]:
    """Return one generation request per answer; all are checked before any runs."""
    loop, messages = asyncio.get_running_loop(), body.conversation()
    text = await loop.run_in_executor(tokenizer.rendering, tokenizer.render_chat, messages)
    prompt_ids = tuple(await asyncio.to_thread(tokenizer.encode_rendered, text))
    requests = []
    for choice in range(body.n):
        request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            max_tokens=body.limit or max(1, engine.max_model_len - len(prompt_ids)),
            sampling=sampling_of(body, engine.sampling),
            seed=seed_of(body, choice),
            stop=body.stop_strings(),
            num_logprobs=body.num_logprobs,
        )
        try:
            engine.check(request)
        except RequestError as error:
            error.param = "messages" if error.param == "prompt" else error.param
            raise
        requests.append(request)
    return requests


class ChatWording:
    """OpenAI's chat objects."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, tokenizer: ServingTokenizer) -> None:
        self._with_logprobs = body.logprobs
        self._tokenizer = tokenizer

    def first(self, index: int) -> dict[str, Any] | None:
        """Say who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the choice of a finished answer."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
        }

    def chunk(self, index: int, event: GenerationEvent) -> dict[str, Any]:
        """Return the choice that carries one event."""
        return {
            "index": index,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._logprobs(event.logprobs),
            "finish_reason": event.finish_reason,
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
