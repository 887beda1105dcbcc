"""Predictors on recorded routes: what they learn from them, and what they would have said."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ....moe.routes.rows import Phase, Routes
from ..forwards import Forward
from ..recorded import RecordedForward
from .predictor import Hint, Predictor, PredictorFacts

LEARNED_ROWS = 64
"""Rows of a sequence that are learned at once."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a predictor says during a recorded forward."""

    begin: list[Hint]
    """Before the first layer."""
    after: list[list[Hint]]
    """After the choice of each MoE layer."""


def learn(predictor: Predictor, routes: Routes, facts: PredictorFacts) -> None:
    """Show a predictor the routes of many sequences, one after the other.

    Their numbers are made negative, so that they are no sequence of the store's.
    """
    order_N = np.lexsort((routes.positions_N, routes.sequences_N))
    sequences_N, experts_NLK = routes.sequences_N[order_N], routes.experts_NLK[order_N]
    starts = np.flatnonzero(np.diff(sequences_N, prepend=sequences_N[0] - 1))
    for start, end in zip(starts, [*starts[1:], len(sequences_N)], strict=True):
        number = -1 - int(sequences_N[start])
        for first in range(start, end, LEARNED_ROWS):
            rows = experts_NLK[first : min(end, first + LEARNED_ROWS)]
            predictor.begin(Forward((number,), (Phase.PREFILL,), (len(rows),)))
            for place, layer in enumerate(facts.moe_layers):
                predictor.see(layer, rows[:, place])


def hints_of(
    predictor: Predictor, forwards: Iterable[RecordedForward], facts: PredictorFacts
) -> Iterator[Said]:
    """Yield what a predictor says in each recorded forward.

    The predictor learns what was chosen after it has spoken, as in a server.
    """
    for recorded in forwards:
        begin = predictor.begin(recorded.forward)
        after = []
        for place, layer in enumerate(facts.moe_layers):
            predictor.see(layer, recorded.experts_NLK[:, place])
            after.append(predictor.after_choice(layer, None))
        yield Said(begin, after)
