"""What a lossy way to run a model costs, measured next to the exact model in the same run.

B windows, L tokens each, T tokens, V vocabulary.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...errors import ConfigError, DataError
from ...moe.folders.prices import Measured
from ...moe.models.generation import GenerationLimits
from ...moe.models.language_model import LanguageModel
from ...moe.models.sampling import SamplingParams
from ..experts.store import ExpertStore
from .held_out_text import score_text

PROMPT = 16
"""Tokens of text before each answer."""
CORE_PROMPT = 128
"""The same where the prompt decides which channels an answer uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A model that is measured."""

    model: LanguageModel
    store: ExpertStore | None
    expert_bytes: int
    """Bytes of one expert in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    length: int | None = None
    """Tokens of a window of the text; None = as ``score_text`` says."""
    steps: int = 2048
    """Tokens that are scored one by one, for ways that depend on what is in memory."""
    answers: int = 4
    tokens: int = 64
    """Of each answer."""

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for counts below 1."""
        for name, least in (("steps", 1), ("answers", 1), ("tokens", 2)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; use a number from {least} upwards."
                )

    @property
    def timed_tokens(self) -> int:
        """All but the first of each answer, which comes with the prompt."""
        return self.answers * (self.tokens - 1)


@dataclass(slots=True)
class _Run:
    """Answers of one arm so far."""

    seconds: float = 0.0
    bytes_read: int = 0
    loss: float = 0.0
    """Of the answers' tokens, by the exact model."""


def measure(
    exact: Arm, lossy: Arm, text: str, plan: Plan, *, depends_on_memory: bool
) -> tuple[Measured, Measured, int]:
    """Return what the exact and the lossy model measure, and on how many tokens.

    Perplexity is that of ``text``. Where it ``depends_on_memory`` which weights are used, tokens
    are scored one by one, as answers are computed, and an expert's bytes are those that were read,
    per expert of a generated token. Where answers use core channels, both models score the second
    halves of windows, and the bytes are those of the channels that were used. A corrected model has
    no scores: its perplexity is the exact model's of its answers. Answers take turns, exact and
    lossy, after one of each that is not counted; their prompts are spread over ``text``. Raises
    :class:`DataError` for a text that is too short.
    """
    runs = _answer_in_turns(exact, lossy, text, plan)
    arms = (exact, lossy)
    core = lossy.model.decoder.core
    if lossy.model.correction is not None:
        num_tokens = plan.answers * plan.tokens
        perplexities = [float(torch.tensor(run.loss / num_tokens).exp()) for run in runs]
    else:
        limit = plan.steps if depends_on_memory else None
        by_steps = depends_on_memory
        how = (plan.length, limit, by_steps, core is not None)
        scores = [score_text(arm.model, text, *how) for arm in arms]
        num_tokens = scores[0].tokens
        perplexities = [score.perplexity for score in scores]
    first, second = (
        Measured(
            perplexity=perplexity,
            expert_bytes=_bytes_of(arm, run, plan) if depends_on_memory else _bytes_used(arm),
            tokens_per_s=plan.timed_tokens / run.seconds,
        )
        for perplexity, arm, run in zip(perplexities, arms, runs, strict=True)
    )
    if first.expert_bytes == 0:
        raise ConfigError(
            "the exact model read no expert for its answers, so all are in memory; set a smaller "
            "expert-memory."
        )
    return first, second, num_tokens


def _answer_in_turns(exact: Arm, lossy: Arm, text: str, plan: Plan) -> list[_Run]:
    ids = exact.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prompt = PROMPT if lossy.model.decoder.core is None else CORE_PROMPT
    stride = (len(ids) - prompt) // (plan.answers + 1)
    if stride < 1:
        raise DataError(f"the text has {len(ids)} tokens; give one of some hundreds or more.")
    runs = [_Run(), _Run()]
    for turn in range(plan.answers + 1):
        start = turn * stride
        prompt_T = torch.tensor(ids[start : start + prompt])
        for arm, run in zip((exact, lossy), runs, strict=True):
            answer_T = _answer(arm, prompt_T, run, turn, plan, is_greedy=_is_greedy(lossy))
            if turn == 0:  # it has filled the slots
                run.seconds, run.bytes_read = 0.0, 0
            else:
                run.loss += _loss(exact.model, answer_T, prompt)
    return runs


def _is_greedy(lossy: Arm) -> bool:
    correction = lossy.model.correction
    return correction is not None and correction.threshold is not None


def _answer(
    arm: Arm, prompt_T: torch.Tensor, run: _Run, seed: int, plan: Plan, is_greedy: bool
) -> torch.Tensor:
    """Return prompt and answer as ids; time and bytes count from the first token on."""
    limits = GenerationLimits(plan.tokens, SamplingParams(temperature=0 if is_greedy else 1), seed)
    steps = arm.model.steps([prompt_T], limits)
    ids = [next(steps)[0]]
    before, started = _bytes_read(arm), time.perf_counter()
    ids += [token for (token,) in steps]
    run.seconds += time.perf_counter() - started
    run.bytes_read += _bytes_read(arm) - before
    return torch.cat([prompt_T, torch.tensor(ids)])


def _loss(model: LanguageModel, answer_T: torch.Tensor, prompt: int) -> float:
    """Return the sum of the losses of an answer's tokens, which follow ``prompt`` others."""
    logits_TV = model(answer_T.unsqueeze(0))[0, prompt - 1 : -1].float()
    return float(F.cross_entropy(logits_TV, answer_T[prompt:], reduction="sum"))


def _bytes_read(arm: Arm) -> int:
    layers = () if arm.store is None else arm.store.statistics.layers.values()
    return sum(layer.bytes_read for layer in layers)


def _bytes_used(arm: Arm) -> float:
    """Return the bytes of an expert that a row uses, as far as they are known: all of them."""
    core = arm.model.decoder.core
    return arm.expert_bytes * (1 if core is None else core.share_used)


def _bytes_of(arm: Arm, run: _Run, plan: Plan) -> float:
    config = arm.model.config
    assert config.moe is not None, "only MoE models have prices"
    per_token = len(config.moe_layers) * config.moe.router.k
    return run.bytes_read / (plan.timed_tokens * per_token)
