"""Continuous batching: every step advances the current requests by one token.

L MoE layers, E experts, V vocabulary.
"""

from collections.abc import Callable
from time import perf_counter

import torch

from ...errors import RequestError
from ...moe.kv_blocks import BLOCK, KVDtype, bytes_per_block
from ...moe.models.exact_rows import rows_are_exact
from ...moe.models.language_model import LanguageModel
from ...moe.models.sampling import SamplingParams
from ...moe.models.text_stream import Decode
from ..experts.store import ExpertStore
from .blocks import BlockPool
from .choosing import choose_tokens, score_prompt
from .drafts.events import joined
from .drafts.opening import open_counted
from .jobs import Job
from .kv_memory import KVMemory, blocks_within, kv_bytes_of, most_blocks, specs_of
from .metrics import EngineMetrics
from .request_checks import check_length, check_request
from .salts import Salts
from .scheduler import Plan, Scheduler
from .sequence import GenerationEvent, GenerationRequest, Sequence
from .step import StepResult, Turn, request_error, run_step


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
        kv_memory: str | None = None,
        kv_dtype: KVDtype | None = None,
        reuses_prefixes: bool = True,
        shares_prompts: bool = True,
        speculative: str = "none",
        speculative_rows: int = 16,
    ) -> None:
        """Make an engine.

        ``prefill_chunk`` rows of prompts are read per step, of all requests together. ``kv_memory``
        (2GiB, 25%) bounds keys and values; None = what a full batch of the longest texts takes.
        With ``kv_dtype`` int8 they are rounded.
        ``shares_prompts`` lets one answer of a group read the prompt for all. ``speculative`` names
        a drafter, whose guesses are up to ``speculative_rows`` more rows.
        """
        self._model = model
        self._decode = decode
        self._prefill_chunk = prefill_chunk
        self._salts = Salts(reuses_prefixes and model.decoder.core is None)  # a core needs all rows
        self._shares_prompts = shares_prompts
        self._has_exact_rows = rows_are_exact(model.decoder)
        check_length(max_model_len, model.config.max_positions)
        longest = max_model_len or model.config.max_positions
        num_blocks = most_blocks(max_num_seqs, longest)
        if kv_memory is not None:
            block_bytes = bytes_per_block(specs_of(model.decoder), kv_dtype)
            num_bytes = kv_bytes_of(kv_memory, block_bytes, max_num_seqs, longest)
            num_blocks = min(num_blocks, blocks_within(num_bytes, block_bytes))
        self.max_model_len = min(longest, num_blocks * BLOCK)
        self._is_short_of_memory = self.max_model_len < longest
        self._memory = KVMemory(model.decoder, num_blocks, kv_dtype)
        self._pool = BlockPool(num_blocks)
        self._scheduler = Scheduler(self._pool, BLOCK, max_num_seqs, prefill_chunk)
        self._sequences: dict[str, Sequence] = {}
        self.metrics = EngineMetrics(model.config, store)
        self._speculation = open_counted(speculative, speculative_rows, model, self.metrics)
        self._count_requests()

    @property
    def has_work(self) -> bool:
        """True while some request is unfinished."""
        return bool(self._sequences)

    @property
    def sampling(self) -> SamplingParams:
        """How the model's folder wants tokens chosen."""
        return self._model.sampling

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; raises :class:`RequestError` for one that cannot be served."""
        self.check(request)
        job = self._job(request)
        sequence = Sequence(request, job, self._decode, self._model.eos_ids)
        self._sequences[request.request_id] = sequence
        self._scheduler.add(job)
        self._count_requests()

    def check(self, request: GenerationRequest) -> None:
        """Raise :class:`RequestError` for prompts that are empty, too long or hold unknown ids."""
        check_request(
            request,
            self.max_model_len,
            self._model.config.vocabulary,
            self._model.eos_ids,
            is_short_of_memory=self._is_short_of_memory,
        )

    def cancel(self, request_id: str) -> None:
        """Drop a request; its blocks are free at once. Unknown ids are ignored."""
        if request_id in self._sequences:
            self.metrics.cancelled.inc()
            self._drop(request_id)
            self._count_requests()

    @torch.inference_mode()
    def step(self) -> list[GenerationEvent]:
        """Run one forward and return an event for every request that got tokens or ended.

        If memory is short or an expert cannot be read, the affected requests end with an error and
        the others continue.
        """
        turns = self._begin(self._scheduler.plan())
        if not turns:
            return []
        step = run_step(self._model.decoder, turns)
        for routings in step.routings:
            self.metrics.count_routing(routings)
        events = [self._fail(sequence, error) for sequence, error in step.failures]
        for result in step.results:
            events += self._take(result)
        if self._speculation is not None:
            self._speculation.end(sum(len(result.hidden_TD) for result in step.results))
        for event in events:
            if event.finish_reason is not None:
                self._drop(event.request_id)
        self._count_requests()
        return events

    def exchange_weights(self, version: int, swap: Callable[[], None]) -> None:
        """Let ``swap`` change the model's weights, between two steps, to those of ``version``.

        Requests that run go on with the new weights and the keys and values that they have. Others
        take over only what was computed with the new weights.
        """
        swap()
        self._salts.weights_version = version
        for sequence in self._sequences.values():
            sequence.job.change_weights(self._salts.of(sequence.request))

    def _job(self, request: GenerationRequest) -> Job:
        return Job(
            request.request_id,
            list(request.prompt_ids),
            len(request.prompt_ids),
            chunk=None if self._has_exact_rows else self._prefill_chunk,
            priority=request.priority,
            salt=self._salts.of(request),
            scores_prompt=request.scores_prompt,
            group=request.group if self._shares_prompts else "",
        )

    def _begin(self, plan: Plan) -> list[Turn]:
        """Give caches the blocks of a plan, and return what each sequence reads."""
        self.metrics.kv.preemptions.inc(len(plan.preempted))
        for job in plan.started:
            self.metrics.kv.count_first_start(job)
        for job in (*plan.started, *plan.returned):
            self._sequences[job.request_id].begin(self._memory.open(job))
        counts = [(self._sequences[job.request_id], count) for job, count in plan.turns]
        self._draft([sequence for sequence, _ in counts])
        for sequence, _ in counts:
            sequence.cache.add_blocks(sequence.job.blocks[len(sequence.cache.blocks) :])
        return [(sequence, sequence.next_ids(count)) for sequence, count in counts]

    def _draft(self, sequences: list[Sequence]) -> None:
        """Choose the drafted rows of a step, as far as there are blocks for them."""
        if self._speculation is None:
            return
        self._speculation.begin(sequences)
        for sequence in sequences:
            if sequence.drafted:
                sequence.keep_drafts(self._scheduler.extend(sequence.job, len(sequence.drafted)))

    def _drop(self, request_id: str) -> None:
        self._scheduler.remove(self._sequences.pop(request_id).job)

    def _take(self, result: StepResult) -> list[GenerationEvent]:
        """Take note of what a sequence has read, and choose its next tokens if it is ready.

        So do the answers that waited for its prompt. A failure ends only one sequence.
        """
        sequence = result.sequence
        self._scheduler.has_read(sequence.job, len(result.hidden_TD) - len(sequence.drafted))
        try:
            score_prompt(self._model.decoder, sequence, result.hidden_TD)
        except Exception as error:
            return [self._fail(sequence, request_error(error))]
        if not len(result.logits_NV):
            return []
        followers = [] if sequence.job.has_begun else self._fork(sequence)
        chosen = [self._choose(one, result.logits_NV) for one in (sequence, *followers)]
        return [event for events in chosen for event in events]

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """Start the answers that want the prompt which ``leader`` has just read."""
        forked = []
        for job in self._scheduler.followers(leader.job):
            blocks = self._scheduler.fork(leader.job, job)
            if blocks is None:
                break
            if blocks[0] != blocks[1]:
                self._memory.copy(*blocks)
            sequence = self._sequences[job.request_id]
            sequence.begin(self._memory.open(job))
            sequence.take_prompt(leader)
            forked.append(sequence)
        return forked

    def _choose(self, sequence: Sequence, logits_NV: torch.Tensor) -> list[GenerationEvent]:
        """Choose a sequence's next tokens; those before a failure count."""
        if sequence.request.max_tokens == 0:
            self.metrics.count_prompt(sequence)
            return [sequence.finish_prompt()]
        accepted: list[GenerationEvent] = []
        failed: list[GenerationEvent] = []
        try:
            for event in choose_tokens(sequence, logits_NV):
                accepted.append(event)
        except Exception as error:
            failed = [self._fail(sequence, request_error(error))]
        if not accepted:
            return failed
        if sequence.drafted:
            sequence.keep_accepted(len(accepted))
            self._scheduler.has_read(sequence.job, len(accepted) - 1)
        if self._speculation is not None:
            self._speculation.taken(len(sequence.drafted), len(accepted) - 1)
        self.metrics.count_tokens(sequence, accepted, perf_counter())
        return [joined(accepted), *failed]

    def _fail(self, sequence: Sequence, error: RequestError) -> GenerationEvent:
        self.metrics.count_failure()
        return sequence.fail(error)

    def _count_requests(self) -> None:
        self.metrics.running.set(self._scheduler.num_running)
        self.metrics.waiting.set(self._scheduler.num_waiting)
        self.metrics.kv.show(self._pool)
