"""Choose the next token from scores. V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""


def sample(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw one token id; greedy ties go to the lower id and draw nothing from ``generator``."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    scores_V, ids_V = (logits_V.float() / params.temperature).sort(descending=True, stable=True)
    if params.top_k:
        scores_V, ids_V = scores_V[: params.top_k], ids_V[: params.top_k]
    probabilities_V = scores_V.softmax(dim=-1)
    if params.top_p < 1:
        before_V = probabilities_V.cumsum(dim=-1) - probabilities_V
        probabilities_V = torch.where(before_V < params.top_p, probabilities_V, 0)
    return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])
