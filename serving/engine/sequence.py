"""One request inside the engine."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import torch

from ...errors import RequestError
from ...moe.adapters.adapter import Adapter
from ...moe.drafts.text import TextDrafts
from ...moe.experts.core_channels import CoreChannels
from ...moe.kv_blocks import BlockCache
from ...moe.models.decoder import Decoder
from ...moe.models.sampling import SamplingParams
from ...moe.models.text_stream import CONTEXT_IDS, Decode, TextStream
from .jobs import Job
from .logprobs import TokenLogprob

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    seed: int | None = None
    stop: tuple[str, ...] = ()
    echo: str = ""
    """Text to put in front of the answer."""
    num_logprobs: int | None = None
    """Likeliest tokens to report for each token; None reports no log-probabilities."""
    ignore_eos: bool = False
    """Go on after the model's end-of-text tokens."""
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end the answer too; they add no text to it."""
    min_tokens: int = 0
    """Tokens before which nothing but a failure ends the answer."""
    scores_prompt: bool = False
    """Report log-probabilities of the prompt's tokens too, before the first generated one."""
    adapter: Adapter | None = None
    """The adapter that the request's rows go through to its end; None = the model alone."""
    priority: int = 0
    """Requests with lower ones come first."""
    cache_salt: str = ""
    """Only requests with equal salts take over what another one has read."""
    group: str = ""
    """Answers to one prompt of one HTTP request have the same; empty for a single answer."""


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """The result of one engine step for a request."""

    request_id: str
    text: str
    """New text; may be empty."""
    num_tokens: int
    """Tokens generated so far."""
    finish_reason: FinishReason | None = None
    error: RequestError | None = None
    stop_token: int | None = None
    """The one of the request's ``stop_token_ids`` that ended the answer."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the new token, if asked for; the first event begins with those of the prompt."""
    cached_tokens: int = 0
    """Tokens of the prompt that were taken over from other requests."""


@dataclass(slots=True)
class SequenceTimes:
    """Moments of a request, in seconds of ``perf_counter``."""

    arrived: float = field(default_factory=perf_counter)
    last_token: float | None = None


class Sequence:
    """A request's state: what was read, what was generated, its cache and its own generator."""

    def __init__(
        self,
        request: GenerationRequest,
        job: Job,
        decode: Decode,
        eos_ids: Items[int] | frozenset[int],
    ) -> None:
        self.request = request
        self.job = job
        """What the scheduler knows of it; has its tokens."""
        self.cache: BlockCache
        """Set by :meth:`begin`."""
        self.times = SequenceTimes()
        eos_ids = frozenset() if request.ignore_eos else frozenset(eos_ids)
        self._end_ids = eos_ids | request.stop_token_ids
        self._stream = TextStream(decode, request.stop, request.prompt_ids[-CONTEXT_IDS:])
        self.prompt_logprobs: list[TokenLogprob] = []
        self.drafts: TextDrafts | None = None
        """Guesses of the next tokens, if the engine speculates."""
        self._core: CoreChannels | None = None
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.job.ids) - self.job.num_prompt

    @property
    def has_read_all(self) -> bool:
        """True when the cache has all known tokens, and the drafted ones, so that the next one can
        be chosen."""
        return self.cache.length == len(self.job.ids) + len(self.drafted)

    @property
    def generates(self) -> bool:
        """True when the next forward reads the last generated token and nothing before it."""
        return self.job.has_begun and self.job.num_left == 1

    @property
    def num_left(self) -> int:
        """Tokens that the answer may still get."""
        return self.request.max_tokens - self.num_generated

    @property
    def last_id(self) -> int:
        """The id of the last generated token."""
        return self.job.ids[-1]

    @property
    def drafted(self) -> tuple[int, ...]:
        """Guessed ids that the next forward reads after the last token."""
        return () if self.drafts is None else self.drafts.ids

    def keep_drafts(self, count: int) -> None:
        """Read only the first ``count`` guessed ids in the next forward."""
        assert self.drafts is not None, "nothing was guessed"
        self.drafts.use(count)

    def drop_drafts(self) -> None:
        """Read no guessed ids in the next forward."""
        if self.drafts is not None:
            self.drafts.drop()

    def ids_from(self, start: int) -> tuple[int, ...]:
        """Return the text's ids from a place on, as far as they are read or generated."""
        end = len(self.job.ids) if self.generates else self.cache.length
        return tuple(self.job.ids[start:end])

    @property
    def forbidden_ids(self) -> list[int]:
        """Ids that may not come next: those that end an answer, while it is too short."""
        return sorted(self._end_ids) if self.num_generated < self.request.min_tokens else []

    def begin(self, cache: BlockCache) -> None:
        """Read from ``cache`` on: at the start, and again whenever its blocks were lost.

        The text and the generator stay as they are. Scores of the prompt that no event has carried
        yet are computed again.
        """
        self.cache = cache
        if not self.job.has_begun:
            self.prompt_logprobs = []

    def core(self, decoder: Decoder) -> CoreChannels | None:
        """Return the core channels of the text, if answers of ``decoder`` use them.

        They stay when the blocks are lost.
        """
        if self._core is None:
            self._core = decoder.new_core(self.job.num_prompt)
        return self._core

    def take_prompt(self, leader: "Sequence") -> None:
        """Take over what ``leader`` has learned of the same prompt."""
        self.prompt_logprobs = list(leader.prompt_logprobs)
        self._core = leader._core

    def next_ids(self, count: int) -> tuple[int, ...]:
        """Return the next ``count`` ids that a forward must read, and those drafted after them."""
        start = self.cache.length
        return (*self.job.ids[start : start + count], *self.drafted)

    def accept(self, token: int, logprobs: Items[TokenLogprob] = ()) -> GenerationEvent:
        """Add a sampled token and return the event."""
        is_first = not self.job.has_begun
        self.job.ids.append(token)
        reason: FinishReason | None = None
        text = ""
        stop_token = token if token in self.request.stop_token_ids else None
        if token in self._end_ids:
            reason = "stop"
        else:
            may_stop = self.num_generated > self.request.min_tokens
            text = self._stream.push(token, may_stop)
            if self._stream.is_stopped:
                reason = "stop"
            elif self.num_generated >= self.request.max_tokens:
                reason = "length"
        if reason is not None:
            text += self._stream.finish()
        if is_first:
            text = self.request.echo + text
            logprobs = [*self.prompt_logprobs, *logprobs]
        return GenerationEvent(
            self.request.request_id,
            text,
            self.num_generated,
            reason,
            stop_token=stop_token,
            logprobs=tuple(logprobs),
            cached_tokens=self.job.num_reused or 0,
        )

    def keep_accepted(self, num_tokens: int) -> None:
        """Forget the drafted ids of the last forward that were wrong; it brought so many tokens."""
        self.cache.length -= 1 + len(self.drafted) - num_tokens

    def finish_prompt(self) -> GenerationEvent:
        """End a request that asks for no tokens, only for its prompt and that prompt's scores."""
        return GenerationEvent(
            self.request.request_id,
            self.request.echo,
            0,
            "length",
            logprobs=tuple(self.prompt_logprobs),
            cached_tokens=self.job.num_reused or 0,
        )

    def fail(self, error: RequestError) -> GenerationEvent:
        """End the request with an error."""
        return GenerationEvent(self.request.request_id, "", self.num_generated, "error", error)
