"""Sampling: a model's defaults, and the choice of the next token. V vocabulary."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import ConfigError

COLDEST = 1e-5
"""Lower temperatures are raised to this; dividing by less overflows fp32."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; use a number from 0 upwards.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; use a number above 0 and up to 1.")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; use 0 for all tokens, or a count.")


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The generation defaults in a model's folder; a caller may override them."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Without values in the folder: temperature 1, all tokens."""
    eos_ids: frozenset[int] = frozenset()
    """Ids that end a text."""
    unknown_eos_ids: tuple[int, ...] = ()
    """End-of-text ids outside the vocabulary, which never occur."""
    not_followed: tuple[str, ...] = ()
    """Keys that are not supported."""


def sample(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw one token id from finite scores.

    Greedy ties go to the lower id and draw nothing from ``generator``.
    """
    if params.temperature == 0:
        return int(logits_V.float().argmax())  # argmax of bf16 is four times slower
    scores_V, ids_V = logits_V.float().sort(descending=True, stable=True)
    if params.top_k:
        scores_V, ids_V = scores_V[: params.top_k], ids_V[: params.top_k]
    scores_V = (scores_V - scores_V[0]) / max(params.temperature, COLDEST)
    probabilities_V = scores_V.softmax(dim=-1)
    if params.top_p < 1:
        is_kept_V = probabilities_V.cumsum(dim=-1) - probabilities_V < params.top_p
        is_kept_V[0] = True
        probabilities_V = torch.where(is_kept_V, probabilities_V, 0)
    return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])
