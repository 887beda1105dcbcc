"""Requests that visit the same experts: the most similar one foretells the rest (MoE-Infinity).

C collected matrices, L MoE layers, E experts, N rows, K choices, D model width.

A matrix ``[L, E]`` counts the visits of one sequence, or of 64 rows of a long one. The current
sequence's matrix is compared with those collected before: the mean cosine over the layers that the
forward has passed. The nearest one's rows of later layers, normalized to chances, are the forecast;
the priority is ``(p + 1e-8) (1 - (i - l) / (L + 1))`` for layer i after layer l
(MoE-Infinity, core/prefetch). A full collection replaces the matrix most similar to the new one.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ....moe.routes.rows import Array
from ..forwards import Forward
from .chances import best_hints, visits, width_of
from .predictor import Hint, PredictorFacts

CAPACITY = 256
"""Matrices. Chosen by hand; time grows with it."""
SEGMENT_ROWS = 64
MOST_SEQUENCES = 256


@dataclass(slots=True)
class _Current:
    """A sequence under way."""

    counts_LE: Array
    rows: int = 0


class Activations:
    """Learns while it runs; a route file gives it a start (table.py)."""

    def __init__(self, facts: PredictorFacts) -> None:
        self._facts = facts
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        self._shape_LE = (len(facts.moe_layers), facts.num_experts)
        self._units_LCE = np.zeros((self._shape_LE[0], 0, self._shape_LE[1]), dtype=np.float32)
        """Collected rows of length 1, for cosines."""
        self._chances_LCE = self._units_LCE
        """The same as shares of the rows that were counted."""
        self._current: OrderedDict[int, _Current] = OrderedDict()
        self._forward = Forward((), (), ())
        self._similar_BC = np.zeros((0, 0), dtype=np.float32)

    def begin(self, forward: Forward) -> list[Hint]:
        """Collect what is complete; nothing is known yet of this forward."""
        for sequence in forward.sequences:
            current = self._current.get(sequence)
            if current is None:
                self._current[sequence] = _Current(np.zeros(self._shape_LE, dtype=np.float32))
            elif current.rows >= SEGMENT_ROWS:
                self._collect(current)
                current.counts_LE, current.rows = current.counts_LE / 2, current.rows // 2
            self._current.move_to_end(sequence)
        while len(self._current) > max(MOST_SEQUENCES, len(forward.sequences)):
            self._collect(self._current.popitem(last=False)[1])
        self._forward = forward
        shape_BC = (len(forward.sequences), self._units_LCE.shape[1])
        self._similar_BC = np.zeros(shape_BC, dtype=np.float32)
        return []

    def see(self, layer: int, experts_NK: Array) -> None:
        """Add the forward's visits to its sequences, and compare the layer."""
        place, first = self._place_of[layer], 0
        pairs = zip(self._forward.sequences, self._forward.lengths, strict=True)
        for index, (sequence, rows) in enumerate(pairs):
            current = self._current[sequence]
            visits_NE = visits(experts_NK[first : first + rows], self._shape_LE[1])
            first += rows
            current.counts_LE[place] += visits_NE.sum(axis=0)
            if place == 0:
                current.rows += rows
            counts_E = current.counts_LE[place]
            length = max(1e-6, float(np.linalg.norm(counts_E)))
            self._similar_BC[index] += self._units_LCE[place] @ (counts_E / length)

    def after_choice(self, layer: int, x_ND: Tensor | None) -> list[Hint]:
        """Return hints from the most similar matrix of each sequence."""
        following, hints = self._facts.following(layer), []
        if not self._similar_BC.size:
            return []
        nearest_B = self._similar_BC.argmax(axis=1)
        num_layers = self._shape_LE[0]
        for distance, target in enumerate(following, start=1):
            chances_BE = self._chances_LCE[self._place_of[target], nearest_B]
            near = 1 - distance / (num_layers + 1)
            priority_E = (1 - np.prod(1 - chances_BE, axis=0) + 1e-8) * near
            width = width_of(self._facts.k, len(nearest_B), distance)
            hints += best_hints(target, priority_E, width)
        return hints

    def _collect(self, current: _Current) -> None:
        """Add a matrix to the collection."""
        counts_LE = current.counts_LE
        lengths_L = np.maximum(np.linalg.norm(counts_LE, axis=1, keepdims=True), 1e-6)
        unit_LE = counts_LE / lengths_L
        chance_LE = np.minimum(counts_LE / max(1, current.rows), 1.0)
        if self._units_LCE.shape[1] < CAPACITY:
            self._units_LCE = np.concatenate([self._units_LCE, unit_LE[:, None]], axis=1)
            self._chances_LCE = np.concatenate([self._chances_LCE, chance_LE[:, None]], axis=1)
            return
        most_similar = int(np.einsum("lce,le->c", self._units_LCE, unit_LE).argmax())
        self._units_LCE[:, most_similar] = unit_LE
        self._chances_LCE[:, most_similar] = chance_LE
