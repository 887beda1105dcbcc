"""What the next gates named, as a column of a route file. N rows, L MoE layers, W experts."""

import numpy as np

from ....moe.routes.format import Column
from ....moe.routes.rows import Array
from .chances import width_of
from .next_gates import NextGates
from .predictor import DISTANCE, PredictorFacts
from .recall import HINTS_COLUMN


class HintColumn:
    """Fills :data:`HINTS_COLUMN` while a model runs; -1 where nothing was asked for."""

    def __init__(self, facts: PredictorFacts, gates: NextGates) -> None:
        self._facts, self._gates = facts, gates
        self._width = min(facts.num_experts, width_of(facts.k, 1, 1))
        column = Column(name=HINTS_COLUMN, dtype="int16", shape=("L", DISTANCE, self._width))
        self.columns: tuple[Column, ...] = (column,)

    def values(self, num_rows: int) -> dict[str, Array]:
        """Return the column of the forward that has just ended."""
        shape = (num_rows, len(self._facts.moe_layers), DISTANCE, self._width)
        hints_NLSW = np.full(shape, -1, dtype=np.int16)
        for place, best in self._gates.named.items():
            best_NSW = np.reshape(best, (num_rows, -1, self._width))
            for number in range(best_NSW.shape[1]):
                width = min(self._width, width_of(self._facts.k, 1, number + 1))
                hints_NLSW[:, place + 1 + number, number, :width] = best_NSW[:, number, :width]
        self._gates.named.clear()  # the next forward may go without hints
        return {HINTS_COLUMN: hints_NLSW}
