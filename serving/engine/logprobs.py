"""Log-probabilities of tokens under the model's own scores. N positions, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = -9999.0
"""What a token that cannot be drawn gets, as OpenAI does: JSON has no minus infinity."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token, with the likeliest ones at its position."""

    token: int
    logprob: float | None
    """None for a prompt's first token, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities, likeliest first."""


def score_tokens(logits_NV: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob]:
    """Return each token's log-probability under its row of raw scores, before any temperature."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    logprobs_NV = logprobs_NV.nan_to_num(nan=LOWEST).clamp_min(LOWEST)
    chosen = logprobs_NV[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    top = logprobs_NV.topk(min(num_top, logprobs_NV.shape[-1]), dim=-1)
    rows = zip(tokens, chosen, top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in rows
    ]
