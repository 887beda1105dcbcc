"""How much of what layers need predictors say before: recall, by distance and width.

N rows, L MoE layers, K choices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....moe.routes.rows import Array, Phase, Routes
from ..forwards import Forward
from .chances import width_of
from .predictor import DISTANCE, Hint, Predictor, PredictorFacts

HINTS_COLUMN = "hints"
"""Column of a route file with what a run was told ahead, int16 ``[L, DISTANCE, W]``: for each MoE
layer and distance, the experts that were named that many layers before it, -1 = none."""


@dataclass(frozen=True, slots=True)
class Recall:
    """What one distance and width came to, over rows that were computed one at a time."""

    distance: int
    width: int
    """The likeliest experts that count, for a row."""
    needed: int
    hinted: int
    right: int
    """Hinted and needed."""

    @property
    def recall(self) -> float:
        """Share of the needed experts that were hinted."""
        return self.right / max(1, self.needed)

    @property
    def precision(self) -> float:
        """Share of the hinted experts that were needed."""
        return self.right / max(1, self.hinted)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return values | {"recall": round(self.recall, 4), "precision": round(self.precision, 4)}


def widths_of(k: int, num_experts: int, distance: int) -> tuple[int, ...]:
    """Return the widths that a table shows: K, and what predictors name at a distance."""
    most = min(num_experts, width_of(k, 1, distance))
    return (k, most) if most > k else (most,)


def split(routes: Routes, held_out: float) -> tuple[Routes, Routes]:
    """Return the rows of the first sequences, to learn from, and of the others, to judge by."""
    sequences = np.unique(routes.sequences_N)
    num_held = min(len(sequences), max(1, round(held_out * len(sequences))))
    is_held_N = np.isin(routes.sequences_N, sequences[len(sequences) - num_held :])
    return routes.select(~is_held_N), routes.select(is_held_N)


def judge(
    predictor: Predictor, routes: Routes, facts: PredictorFacts, most_rows: int
) -> list[Recall]:
    """Return recalls of the first ``most_rows`` rows, each as if it were decoded alone.

    The first row of a sequence does not count, because nothing comes before it.
    """
    found = _Counts(facts)
    for forward, is_first, experts_LK in _rows(routes, most_rows):
        predictor.begin(forward)
        for place, layer in enumerate(facts.moe_layers):
            predictor.see(layer, experts_LK[None, place])
            if place + 1 < len(facts.moe_layers) and not is_first:
                found.add(place, predictor.after_choice(layer, None), experts_LK)
    return found.recalls()


def judge_column(routes: Routes, facts: PredictorFacts) -> list[Recall]:
    """Return recalls of the hints that a run recorded (:data:`HINTS_COLUMN`), row by row."""
    hints_NLSW = routes.columns[HINTS_COLUMN]
    found = []
    for number in range(hints_NLSW.shape[2]):
        hints_NLW = hints_NLSW[:, number + 1 :, number]
        experts_NLK = routes.experts_NLK[:, number + 1 :]
        has_hint_NL1 = (hints_NLW >= 0).any(axis=2, keepdims=True)
        for width in widths_of(facts.k, facts.num_experts, number + 1):
            named_NLW = hints_NLW[:, :, :width]
            is_there_NLWK = named_NLW[..., None] == experts_NLK[:, :, None, :]
            right = int((is_there_NLWK & (named_NLW >= 0)[..., None]).sum())
            needed = int(((experts_NLK >= 0) & has_hint_NL1).sum())
            hinted = int((named_NLW >= 0).sum())
            found.append(Recall(number + 1, width, needed, hinted, right))
    return found


class _Counts:
    def __init__(self, facts: PredictorFacts) -> None:
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        self._last = len(facts.moe_layers) - 1
        self._widths = {
            distance: widths_of(facts.k, facts.num_experts, distance)
            for distance in range(1, DISTANCE + 1)
        }
        keys = [(distance, w) for distance, widths in self._widths.items() for w in widths]
        self._found = {key: [0, 0, 0] for key in keys}

    def add(self, place: int, hints: list[Hint], experts_LK: Array) -> None:
        named: dict[int, list[int]] = {
            place + distance: []
            for distance in range(1, DISTANCE + 1)
            if place + distance <= self._last
        }
        for (layer, expert), _ in hints:
            if self._place_of[layer] in named:
                named[self._place_of[layer]].append(expert)
        for target, experts in named.items():
            needed = {expert for expert in experts_LK[target].tolist() if expert >= 0}
            for width in self._widths[target - place]:
                counts = self._found[target - place, width]
                counts[0] += len(needed)
                counts[1] += len(experts[:width])
                counts[2] += len(needed.intersection(experts[:width]))

    def recalls(self) -> list[Recall]:
        return [Recall(*key, *counts) for key, counts in self._found.items() if counts[0]]


def _rows(routes: Routes, most_rows: int) -> Iterator[tuple[Forward, bool, Array]]:
    """Yield each row as a forward, whether it begins its sequence, and its experts ``[L, K]``."""
    order_N = np.lexsort((routes.positions_N, routes.sequences_N))[:most_rows]
    before = None
    for row in order_N.tolist():
        sequence = int(routes.sequences_N[row])
        forward = Forward((sequence,), (Phase.DECODE,), (1,))
        yield forward, sequence != before, routes.experts_NLK[row]
        before = sequence
