"""Does a model choose the experts that were recorded, and what do other choices change?

T rows of a text, L MoE layers, K choices, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from ..batch import batch_of
from ..models.decoder import Decoder
from .format import RouteHeader
from .identity import identity_of
from .replay import with_routes
from .rows import Phase, Routes


@dataclass(frozen=True, slots=True)
class Comparison:
    """Recorded texts read twice: with the model's own choices, and with the recorded ones."""

    texts: int
    rows: int
    same_weights: bool
    """Whether the model's weights are those that the routes were recorded with."""
    same_choices: float
    """Share of recorded choices that the model makes, too, in any order."""
    same_rows: float
    """Share of rows where all layers choose the same experts."""
    largest_logit_difference: float
    """Between both readings."""
    same_next_token: float
    """Share of rows with the same likeliest next token."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@torch.inference_mode()
def compare(
    decoder: Decoder, header: RouteHeader, routes: Routes, limit: int | None = None
) -> Comparison:
    """Read the first ``limit`` recorded texts (None = all), each in one forward.

    Raises :class:`DataError` for routes of training, and if there is no whole text.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; use 1 or more.")
    texts = rows = choices = same_choices = same_rows = same_tokens = 0
    largest = 0.0
    for ids_T, experts_TLK in _texts(routes):
        batch = batch_of([ids_T.to(decoder.embed_tokens.weight.device)])
        own = decoder(batch)
        replayed = decoder(with_routes(batch, decoder.config, experts_TLK))
        own_TLK = torch.stack([routing.experts_TK for routing in own.routings], dim=1).cpu()
        is_same_TLK = (experts_TLK.unsqueeze(-1) == own_TLK.unsqueeze(-2)).any(dim=-1)
        is_same_TLK |= experts_TLK < 0
        own_TV, replayed_TV = (decoder.logits(o.hidden_TD).float() for o in (own, replayed))
        texts += 1
        rows += len(ids_T)
        choices += int((experts_TLK >= 0).sum())
        same_choices += int((is_same_TLK & (experts_TLK >= 0)).sum())
        same_rows += int(is_same_TLK.all(dim=-1).all(dim=-1).sum())
        same_tokens += int((own_TV.argmax(dim=-1) == replayed_TV.argmax(dim=-1)).sum())
        largest = max(largest, float((own_TV - replayed_TV).abs().max()))
        if texts == limit:
            break
    if not texts:
        raise DataError("the routes have no text from its first token; record generation.")
    weights = identity_of(decoder.config, decoder).weights
    return Comparison(
        texts=texts,
        rows=rows,
        same_weights=header.model.weights == weights,
        same_choices=round(same_choices / max(1, choices), 6),
        same_rows=round(same_rows / rows, 6),
        largest_logit_difference=largest,
        same_next_token=round(same_tokens / rows, 6),
    )


def _texts(routes: Routes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and experts of each sequence that was recorded from position 0 without a gap."""
    if (routes.phases_N == Phase.TRAIN).any():
        raise DataError(
            "the routes are those of training, whose weights change; give routes of generation."
        )
    order_N = np.lexsort((routes.positions_N, routes.sequences_N))
    starts = np.flatnonzero(np.diff(routes.sequences_N[order_N], prepend=-1))
    for rows in np.split(order_N, starts[1:]):
        if np.array_equal(routes.positions_N[rows], np.arange(len(rows))):
            ids_T = torch.from_numpy(routes.tokens_N[rows].astype(np.int64))
            yield ids_T, torch.from_numpy(routes.experts_NLK[rows])
