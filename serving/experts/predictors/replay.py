"""Predictors on recorded routes: what they learn from them, and what they would have said.

N rows, L MoE layers, K choices.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ....moe.routes.rows import Array, Phase, Routes
from ..forwards import Forward
from .predictor import Hint, Predictor, PredictorFacts

LEARNED_ROWS = 64
"""Rows of a sequence that are learned at once."""


@dataclass(frozen=True, slots=True)
class RecordedForward:
    """A forward that was recorded, with what a predictor said during it."""

    forward: Forward
    experts_NLK: Array
    """In the order of the forward's sequences."""
    begin: list[Hint]
    """Said before the first layer."""
    after: list[list[Hint]]
    """Said after the choice of each MoE layer."""


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
    predictor: Predictor, routes: Routes, facts: PredictorFacts
) -> Iterator[RecordedForward]:
    """Yield the recorded forwards in their order, with the hints of a predictor.

    The predictor learns what was chosen after it has spoken, as in a server.
    """
    for forward, experts_NLK in recorded_forwards(routes):
        begin = predictor.begin(forward)
        after = []
        for place, layer in enumerate(facts.moe_layers):
            predictor.see(layer, experts_NLK[:, place])
            after.append(predictor.after_choice(layer, None))
        yield RecordedForward(forward, experts_NLK, begin, after)


def recorded_forwards(routes: Routes) -> Iterator[tuple[Forward, Array]]:
    """Yield forwards and their rows' experts ``[N, L, K]``, in the order they ran."""
    order_N = np.lexsort((routes.positions_N, routes.sequences_N, routes.steps_N))
    steps_N, sequences_N = routes.steps_N[order_N], routes.sequences_N[order_N]
    experts_NLK, phases_N = routes.experts_NLK[order_N], routes.phases_N[order_N]
    starts = np.flatnonzero(np.diff(steps_N, prepend=steps_N[0] - 1))
    for start, end in zip(starts, [*starts[1:], len(steps_N)], strict=True):
        own = sequences_N[start:end]
        firsts = np.flatnonzero(np.diff(own, prepend=own[0] - 1))
        lengths = np.diff([*firsts, len(own)])
        phases = tuple(Phase(int(phase)) for phase in phases_N[start:end][firsts])
        forward = Forward(tuple(own[firsts].tolist()), phases, tuple(lengths.tolist()))
        yield forward, experts_NLK[start:end]
