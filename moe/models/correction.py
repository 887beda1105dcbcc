"""Answers of a lossy model, corrected by the exact one (after Sirius, arXiv 2409.03856).

Both are one model with one cache: the lossy one leaves out or rounds weights that the exact one
has. N tokens of a window, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch import batch_of
from ..kv_cache import SequenceCache
from ..routers.causal import check_causal
from .decoder import Decoder
from .draft_rows import TextRows, run_rows
from .generation import GenerationLimits
from .sampling import sample

TEMPERATURE = 0.6
"""Of the probabilities that a threshold is compared with, although answers are greedy (Sirius)."""


@dataclass(slots=True)
class Correction:
    """How often the exact model checks, what it accepts, and what came of it."""

    period: int
    """Tokens of a window: its first is the exact model's, the others are proposals."""
    lossily: Callable[[], AbstractContextManager[None]]
    """Makes the model lossy inside a ``with`` block; outside it is exact."""
    threshold: float | None = None
    """Probability from which a proposal is accepted; None = only the exact model's own choice."""
    num_periods: int = 0
    num_tokens: int = 0
    """Tokens that the periods brought."""

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for values out of range."""
        check_correction(self.period, self.threshold)

    @property
    def mean_advance(self) -> float:
        """Tokens of an answer per check, at most ``period``."""
        return self.num_tokens / max(1, self.num_periods)


def check_correction(period: int, threshold: float | None) -> None:
    """Raise :class:`ConfigError` for values out of range."""
    if type(period) is not int or period < 2:
        raise ConfigError(
            f"expert-correction is {period!r}; use the tokens of a window, from 2 upwards."
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise ConfigError(
            f"expert-correction-threshold is {threshold!r}; use a probability above 0 and up to 1."
        )


def check_corrected(num_prompts: int, adapter: str | None) -> None:
    """Raise :class:`ConfigError` for what is not corrected: several prompts, or an adapter."""
    if adapter is not None:
        raise ConfigError(
            f"adapter is {adapter!r}, but expert-correction is for the model alone; leave one out."
        )
    if num_prompts > 1:
        raise ConfigError(
            f"there are {num_prompts} prompts, but expert-correction is for one text at a time; "
            "give one, or leave it out."
        )


@torch.inference_mode()
def corrected_row(
    decoder: Decoder, ids_T: Tensor, limits: GenerationLimits, correction: Correction
) -> Iterator[list[int]]:
    """Yield the next token of one text, as ``continue_rows`` does.

    The exact model reads the prompt and draws the first token. Then, period by period, the lossy
    model proposes tokens, and one exact forward over the window replaces their keys and values and
    draws again at every position, with the same random numbers. Proposals are accepted up to the
    first that differs, and there the exact model's token is taken. So without a threshold the
    tokens are those of the exact model with this seed. Only the exact model ends a text.

    Raises :class:`ConfigError` for a threshold where the answer is not greedy.
    """
    if correction.threshold is not None and limits.sampling.temperature > 0:
        raise ConfigError(
            f"temperature is {limits.sampling.temperature}, but expert-correction-threshold is for "
            "greedy answers; set temperature 0, or leave the threshold out."
        )
    for router in decoder.routers():
        check_causal(router.config)
    row = _Row(decoder, ids_T, limits)
    left = limits.max_new_tokens
    token: int | None = None
    while left > 0:
        drafts: list[int] = []
        if token is not None:
            drafts = row.propose(token, min(correction.period, left) - 1, correction)
        accepted = row.check(token, drafts, correction.threshold)
        if token is not None:
            correction.num_periods += 1
            correction.num_tokens += len(accepted)
        left -= len(accepted)
        for token in accepted:
            yield [token]
        if token in limits.eos_ids:
            return


class _Row:
    """One text, its cache and its random numbers."""

    def __init__(self, decoder: Decoder, ids_T: Tensor, limits: GenerationLimits) -> None:
        self._decoder = decoder
        self._prompt_T = ids_T
        self._limits = limits
        self._generator = torch.Generator()
        if limits.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(limits.seed)
        self._cache: SequenceCache = decoder.new_cache(len(ids_T) + limits.max_new_tokens)

    def propose(self, token: int, count: int, correction: Correction) -> list[int]:
        """Return up to ``count`` tokens that the lossy model draws after ``token``.

        Leaves the random numbers and the length of the cache as they were.
        """
        start, drafts = self._cache.length, list[int]()
        generator = torch.Generator()
        generator.set_state(self._generator.get_state())
        with correction.lossily():
            while len(drafts) < count and token not in self._limits.eos_ids:
                logits_1V = self._scores([token])
                token = sample(logits_1V[0], self._limits.sampling, generator)
                drafts.append(token)
        self._cache.length = start
        return drafts

    def check(self, token: int | None, drafts: Sequence[int], threshold: float | None) -> list[int]:
        """Return the accepted drafts and the exact model's token after them; they are in the cache
        but for the last. ``token`` is the one before the drafts, None for the prompt."""
        window = [] if token is None else [token, *drafts]
        logits_NV = self._scores(window) if window else self._scores_of_prompt()
        start = self._cache.length - len(logits_NV)
        accepted: list[int] = []
        for logits_V, draft in zip(logits_NV, [*drafts, None], strict=True):
            choice = sample(logits_V, self._limits.sampling, self._generator)
            accepted.append(self._taken(logits_V, choice, draft, threshold))
            if accepted[-1] != draft or draft in self._limits.eos_ids:
                break
        self._cache.length = start + len(accepted)
        return accepted

    def _taken(
        self, logits_V: Tensor, choice: int, draft: int | None, threshold: float | None
    ) -> int:
        """Return the draft if a threshold accepts it, else the exact model's choice."""
        if draft is None or threshold is None or draft in self._limits.eos_ids:
            return choice
        probability = (logits_V.float() / TEMPERATURE).softmax(dim=-1)[draft]
        return draft if probability >= threshold else choice

    def _scores(self, ids: list[int]) -> Tensor:
        """Return the scores after each of some tokens that follow the cache, ``[N, V]``.

        Each is a sequence of one row, so its bits are those of a single step. Torch's attention
        rounds several positions of one sequence differently.
        """
        self._cache.reserve(len(ids))
        text = TextRows(self._cache, tuple(ids), None, len(ids) - 1)
        logits_NV: Tensor = self._decoder.logits(run_rows(self._decoder, [text]).hidden_TD)
        return logits_NV.cpu()

    def _scores_of_prompt(self) -> Tensor:
        """Read the prompt and return the scores after its last token, ``[1, V]``."""
        hidden_TD = self._decoder(batch_of([self._prompt_T], [self._cache])).hidden_TD
        logits_1V: Tensor = self._decoder.logits(hidden_TD[-1:]).cpu()
        return logits_1V
