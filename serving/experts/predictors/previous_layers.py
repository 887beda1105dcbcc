"""Paths through the layers (EdgeMoE): the last two layers' experts foretell the next one's.

N rows, L MoE layers, E experts, K choices, D model width.

EdgeMoE keeps a table from the experts of the two previous layers to the chances of the next one's.
Where a row visits many experts, few pairs of whole sets ever come again. So the key is the best
expert of each of the two layers; behind it stands the mean over all experts of the previous layer,
and behind that how often an expert is visited at all. Each level counts as :data:`BACKING` rows of
the next.
"""

import numpy as np
from torch import Tensor

from ....moe.routes.rows import Array
from ..forwards import Forward
from .chances import any_of, best_hints, visits, width_of
from .predictor import DISTANCE, Hint, PredictorFacts
from .recency import Recency

BACKING = 4.0
MOST_KEYS = 1 << 16
"""Pairs of experts that are remembered over all layers; later ones are left out."""
MOST_COUNT = 1024.0
"""Rows of an expert after which its counts are halved: what is learned can change."""


class PreviousLayers:
    """Learns while it runs; a route file gives it a start (table.py)."""

    def __init__(self, facts: PredictorFacts) -> None:
        self._facts = facts
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        num_layers, num_experts = len(facts.moe_layers), facts.num_experts
        self._plain_LE = np.zeros((num_layers, num_experts), dtype=np.float32)
        shape_SLEE = (DISTANCE, num_layers, num_experts, num_experts)
        self._after_SLEE = np.zeros(shape_SLEE, dtype=np.float32)
        """Of each distance and layer: visits to its experts by rows that visited an expert of the
        layer that many layers before it."""
        self._rows_SLE = np.zeros(shape_SLEE[:3], dtype=np.float32)
        """Rows behind ``after``, by the expert of the earlier layer."""
        self._pairs: dict[tuple[int, int, int], tuple[Array, Array]] = {}
        """By layer and the best experts two and one layers before: visits ``[E]``, rows ``[1]``."""
        self._seen_LNK: list[Array] = []
        self._recency = Recency(facts)

    def begin(self, forward: Forward) -> list[Hint]:
        """Return hints for the first layer, by the tokens before: no layer comes before it."""
        self._seen_LNK = []
        self._recency.begin(forward)
        return self._first_hints(len(forward.sequences))

    def see(self, layer: int, experts_NK: Array) -> None:
        """Count the choice under what was chosen before it."""
        place = self._place_of[layer]
        visits_NE = visits(experts_NK, self._facts.num_experts)
        self._plain_LE[place] += visits_NE.sum(axis=0)
        if place == 0:
            self._recency.see(layer, experts_NK)
        else:
            for number in range(min(DISTANCE, place)):
                self._count_after(number, place, self._seen_LNK[place - number - 1], visits_NE)
            if place > 1:
                first_NK, second_NK = self._seen_LNK[place - 2 : place]
                self._count_pairs(place, first_NK, second_NK, visits_NE)
        self._seen_LNK.append(experts_NK)

    def after_choice(self, layer: int, x_ND: Tensor | None) -> list[Hint]:
        """Return hints for the next layers."""
        following = self._facts.following(layer)
        rows = len(self._seen_LNK[-1])
        if not following:
            return self._first_hints(rows)
        hints = []
        last_NE = visits(self._seen_LNK[-1], self._facts.num_experts)
        for distance, target in enumerate(following, start=1):
            chances_NE = self._after(distance - 1, self._place_of[target], last_NE)
            if distance == 1 and len(self._seen_LNK) > 1:
                self._refine(self._place_of[target], chances_NE)
            width = width_of(self._facts.k, rows, distance)
            hints += best_hints(target, any_of(chances_NE), width)
        return hints

    def _first_hints(self, rows: int) -> list[Hint]:
        first = self._facts.moe_layers[0]
        return best_hints(first, self._recency.chances(first), width_of(self._facts.k, rows, 1))

    def _count_after(self, number: int, place: int, before_NK: Array, visits_NE: Array) -> None:
        after_EE, rows_E = self._after_SLEE[number, place], self._rows_SLE[number, place]
        if len(visits_NE) == 1:
            experts = before_NK[0][before_NK[0] >= 0]
            rows_E[experts] += 1
            after_EE[experts] += visits_NE[0]
        else:
            visited_NE = visits(before_NK, self._facts.num_experts)
            rows_E += visited_NE.sum(axis=0)
            after_EE += visited_NE.T @ visits_NE
        if rows_E.max() > MOST_COUNT:
            full = np.flatnonzero(rows_E > MOST_COUNT)
            rows_E[full] /= 2
            after_EE[full] /= 2

    def _count_pairs(self, place: int, first_NK: Array, second_NK: Array, visits_NE: Array) -> None:
        for first, second, visits_E in zip(
            first_NK[:, 0].tolist(), second_NK[:, 0].tolist(), visits_NE, strict=True
        ):
            key = (place, first, second)
            found = self._pairs.get(key)
            if found is None:
                if len(self._pairs) >= MOST_KEYS:
                    continue
                found = (np.zeros_like(visits_E), np.zeros(1, dtype=np.float32))
                self._pairs[key] = found
            found[0][:] += visits_E
            found[1][0] += 1

    def _after(self, number: int, place: int, before_NE: Array) -> Array:
        """Return the chances of a layer's experts, ``[N, E]``, after visits before it."""
        plain_E = self._plain_LE[place]
        even_E = self._facts.k * plain_E / max(1.0, float(plain_E.sum()))
        weights_NE = before_NE / np.maximum(before_NE.sum(axis=1, keepdims=True), 1)
        share_NE = weights_NE / (self._rows_SLE[number, place] + BACKING)
        chances_NE = share_NE @ self._after_SLEE[number, place]
        chances_NE += BACKING * share_NE.sum(axis=1, keepdims=True) * even_E
        return np.asarray(np.minimum(chances_NE, 1.0))

    def _refine(self, place: int, chances_NE: Array) -> None:
        """Put the chances of a known pair of experts in front of those of the last layer."""
        firsts, seconds = (experts_NK[:, 0].tolist() for experts_NK in self._seen_LNK[-2:])
        for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            found = self._pairs.get((place, first, second))
            if found is not None:
                visits_E, rows = found
                chances_NE[row] = (visits_E + BACKING * chances_NE[row]) / (rows[0] + BACKING)
