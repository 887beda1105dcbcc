"""Which experts sequences visited lately.

B sequences, N rows, L MoE layers, E experts, K choices.
"""

from collections import OrderedDict

import numpy as np

from ....moe.routes.rows import Array, Phase
from ..forwards import Forward
from .chances import any_of, visits
from .predictor import PredictorFacts

MOST_SEQUENCES = 256
"""Sequences that are remembered, the latest ones."""
DECAY = 0.7
"""What an average keeps from token to token."""
ROWS = 16
"""Rows of a prompt's piece that count; with :data:`DECAY` the ones before weigh 0.3 %."""


class Recency:
    """Exponential averages of each sequence's visits to each expert."""

    def __init__(self, facts: PredictorFacts) -> None:
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        self._shape_LE = (len(facts.moe_layers), facts.num_experts)
        self._known: OrderedDict[int, Array] = OrderedDict()
        self._forward = Forward((), (), ())

    def begin(self, forward: Forward) -> None:
        """Hear of a forward."""
        self._forward = forward

    def see(self, layer: int, experts_NK: Array) -> None:
        """Count the visits of the forward's rows."""
        place, first = self._place_of[layer], 0
        for sequence, rows in zip(self._forward.sequences, self._forward.lengths, strict=True):
            last_NE = visits(experts_NK[first : first + rows][-ROWS:], self._shape_LE[1])
            first += rows
            weights_N = (1 - DECAY) * DECAY ** np.arange(len(last_NE) - 1, -1, -1)
            average_LE = self._of(sequence)
            average_LE[place] *= DECAY ** len(last_NE)
            average_LE[place] += weights_N.astype(np.float32) @ last_NE

    def chances(self, layer: int) -> Array:
        """Return the chance that the next tokens of the forward's sequences visit an expert, [E].

        Sequences that read their prompt, or were not seen before, say nothing.
        """
        pairs = zip(self._forward.sequences, self._forward.phases, strict=True)
        known = [s for s, phase in pairs if phase == Phase.DECODE and s in self._known]
        if not known:
            return np.zeros(self._shape_LE[1], dtype=np.float32)
        place = self._place_of[layer]
        return any_of(np.stack([self._known[sequence][place] for sequence in known]))

    def by_row(self, layer: int) -> Array:
        """Return how lately each row's sequence visited an expert before this forward, ``[N, E]``.

        Known is what :meth:`see` had counted; zeros for sequences that were not seen.
        """
        place = self._place_of[layer]
        nothing_E = np.zeros(self._shape_LE[1], dtype=np.float32)
        known = [self._known.get(sequence) for sequence in self._forward.sequences]
        rows_BE = np.stack([nothing_E if own is None else own[place] for own in known])
        if len(rows_BE) == sum(self._forward.lengths):
            return rows_BE
        return np.repeat(rows_BE, self._forward.lengths, axis=0)

    def _of(self, sequence: int) -> Array:
        found = self._known.get(sequence)
        if found is None:
            found = np.zeros(self._shape_LE, dtype=np.float32)
            self._known[sequence] = found
            if len(self._known) > MOST_SEQUENCES:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(sequence)
        return found
