"""Continuous batching: every step advances the current requests by one token.

L MoE layers, E experts, V vocabulary.
"""

from collections import deque
from time import perf_counter

import torch

from ...errors import ConfigError, RequestError
from ...kernels.values.memory import is_out_of_memory
from ...moe.models.language_model import LanguageModel
from ...moe.models.sampling import SamplingParams, sample
from ...moe.models.text_stream import Decode
from ..experts.store import ExpertStore
from .drafts.checks import check_rows_alone
from .drafts.events import joined
from .drafts.speculation import Speculation
from .drafts.table import drafter_named
from .logprobs import TokenLogprob, score_tokens
from .metrics import EngineMetrics
from .sequence import GenerationEvent, GenerationRequest, Sequence
from .step import StepResult, out_of_memory, run_step


class Engine:
    """Requests in, events out. Knows nothing of HTTP; used by one thread."""

    def __init__(
        self,
        model: LanguageModel,
        decode: Decode,
        store: ExpertStore | None = None,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        prefill_chunk: int = 256,
        speculative: str = "none",
        speculative_rows: int = 16,
    ) -> None:
        self._model = model
        self._decode = decode
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        check_length(max_model_len, model.config.max_positions)
        self.max_model_len = max_model_len or model.config.max_positions
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.metrics = EngineMetrics(model.config, store)
        self._speculation = None
        make_drafter = drafter_named(speculative)
        if make_drafter is not None:
            check_rows_alone(model.decoder)
            registry = self.metrics.registry
            self._speculation = Speculation(make_drafter, speculative_rows, registry)

    @property
    def has_work(self) -> bool:
        """True while some request is unfinished."""
        return bool(self._waiting or self._running)

    @property
    def sampling(self) -> SamplingParams:
        """How the model's folder wants tokens chosen."""
        return self._model.sampling

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; raises :class:`RequestError` for one that cannot be served."""
        self.check(request)
        length = len(request.prompt_ids) + request.max_tokens
        cache = self._model.decoder.new_cache(length)
        self._waiting.append(Sequence(request, cache, self._decode, self._model.eos_ids))
        self._count_requests()

    def check(self, request: GenerationRequest) -> None:
        """Raise :class:`RequestError` for prompts that are empty, too long or hold unknown ids."""
        length, vocabulary = len(request.prompt_ids), self._model.config.vocabulary
        if length == 0:
            raise RequestError("prompt is empty; give at least one token.", param="prompt")
        if length + request.max_tokens > self.max_model_len:
            raise RequestError(
                # litellm and others look for these words, to try a model with a longer context.
                f"This model's maximum context length is {self.max_model_len} tokens, but the "
                f"prompt has {length} and max_tokens is {request.max_tokens}; shorten one of them.",
                param="prompt" if length >= self.max_model_len else "max_tokens",
                code="context_length_exceeded",
            )
        for token in request.prompt_ids:
            if not 0 <= token < vocabulary:
                raise RequestError(
                    f"prompt holds token id {token}; ids of this model are in [0, {vocabulary}).",
                    param="prompt",
                )

        for token in request.stop_token_ids:
            if not 0 <= token < vocabulary:
                raise RequestError(
                    f"stop_token_ids holds {token}; ids of this model are in [0, {vocabulary}).",
                    param="stop_token_ids",
                )
        if request.min_tokens > request.max_tokens:
            raise RequestError(
                f"min_tokens is {request.min_tokens}, but the answer ends after "
                f"{request.max_tokens} tokens; lower it.",
                param="min_tokens",
            )
        if request.min_tokens and len(request.stop_token_ids | self._model.eos_ids) >= vocabulary:
            raise RequestError(
                "min_tokens with every token in stop_token_ids leaves none to choose; list fewer.",
                param="stop_token_ids",
            )

    def cancel(self, request_id: str) -> None:
        """Drop a request and its cache; unknown ids are ignored."""
        before = len(self._waiting) + len(self._running)
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        self._running = [s for s in self._running if s.request.request_id != request_id]
        self.metrics.cancelled.inc(before - len(self._waiting) - len(self._running))
        self._count_requests()

    @torch.inference_mode()
    def step(self) -> list[GenerationEvent]:
        """Run one forward and return an event for every request that got tokens or ended.

        If memory is short or an expert cannot be read, the affected requests end with an error and
        the others continue.
        """
        while self._waiting and len(self._running) < self._max_num_seqs:
            self._running.append(self._waiting.popleft())
        batch = self._choose()
        if not batch:
            return []
        if self._speculation is not None:
            self._speculation.begin(batch)
        step = run_step(self._model.decoder, batch, self._prefill_chunk)
        for routings in step.routings:
            self.metrics.count_routing(routings)
        events = [self._fail(sequence, error) for sequence, error in step.failures]
        events += [event for result in step.results for event in self._take(result)]
        if self._speculation is not None:
            self._speculation.end(sum(len(result.hidden_TD) for result in step.results))
        ended = {event.request_id for event in events if event.finish_reason is not None}
        self._running = [s for s in self._running if s.request.request_id not in ended]
        self._count_requests()
        return events

    def _choose(self) -> list[Sequence]:
        """Choose all requests that decode, and the oldest one that still reads its prompt."""
        decoding = [s for s in self._running if not s.is_prefilling]
        prefilling = [s for s in self._running if s.is_prefilling]
        return decoding + prefilling[:1]

    def _take(self, result: StepResult) -> list[GenerationEvent]:
        """Choose a sequence's next tokens if it is ready; a failure ends only this sequence."""
        sequence = result.sequence
        accepted: list[GenerationEvent] = []
        failed: list[GenerationEvent] = []
        try:
            self._score_prompt(sequence, result.hidden_TD)
            if len(result.logits_NV) and sequence.request.max_tokens == 0:
                self.metrics.count_prompt(sequence)
                return [sequence.finish_prompt()]
            self._accept_rows(sequence, result.logits_NV, accepted)
        except RequestError as error:
            failed = [self._fail(sequence, error)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = [self._fail(sequence, out_of_memory())]
        if not accepted:
            return failed
        if self._speculation is not None:
            self._speculation.taken(len(sequence.drafted), len(accepted) - 1)
        self.metrics.count_tokens(sequence, accepted, perf_counter())
        return [joined(accepted), *failed]

    def _accept_rows(
        self, sequence: Sequence, logits_NV: torch.Tensor, accepted: list[GenerationEvent]
    ) -> None:
        """Choose a token from each row as if it were alone, up to the first that was not drafted.

        The events come into ``accepted``, also those before a failure.
        """
        drafted = sequence.drafted
        for row, logits_V in enumerate(logits_NV):
            if not logits_V.isfinite().all():
                raise _not_finite()
            accepted.append(self._accept(sequence, logits_V))
            is_last = accepted[-1].finish_reason is not None
            if is_last or drafted[row : row + 1] != (sequence.last_id,):
                break
        if drafted:
            sequence.keep_accepted(len(accepted))

    def _accept(self, sequence: Sequence, logits_V: torch.Tensor) -> GenerationEvent:
        request = sequence.request
        allowed_V = logits_V
        if forbidden := sequence.forbidden_ids:
            allowed_V = logits_V.index_fill(0, torch.tensor(forbidden), -torch.inf)
        token = sample(allowed_V, request.sampling, sequence.generator)
        scores: list[TokenLogprob] = []
        if request.num_logprobs is not None:
            scores = score_tokens(logits_V.unsqueeze(0), [token], request.num_logprobs)
        return sequence.accept(token, scores)

    def _fail(self, sequence: Sequence, error: RequestError) -> GenerationEvent:
        self.metrics.count_failure()
        return sequence.fail(error)

    def _score_prompt(self, sequence: Sequence, hidden_TD: torch.Tensor) -> None:
        """Add the log-probabilities of the prompt tokens just read, if asked for."""
        request = sequence.request
        if not request.scores_prompt or request.num_logprobs is None:
            return
        end = sequence.cache.length
        start = end - len(hidden_TD)
        if start == 0:
            sequence.prompt_logprobs.append(TokenLogprob(request.prompt_ids[0], None))
        targets = list(request.prompt_ids[start + 1 : end + 1])
        if targets:
            logits_NV = self._model.decoder.logits(hidden_TD[: len(targets)])
            sequence.prompt_logprobs += score_tokens(logits_NV, targets, request.num_logprobs)

    def _count_requests(self) -> None:
        self.metrics.running.set(len(self._running))
        self.metrics.waiting.set(len(self._waiting))


def _not_finite() -> RequestError:
    message = "the model gave scores that are not finite; check its weights."
    return RequestError(message, code="unavailable", status=503)


def check_length(max_model_len: int | None, longest: int) -> None:
    """Refuse a limit beyond what the model takes."""
    if max_model_len is not None and max_model_len > longest:
        raise ConfigError(
            f"max-model-len is {max_model_len}, but the model takes {longest}; lower it."
        )
