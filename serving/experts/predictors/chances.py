"""From the chances of single rows to hints for a forward. N rows, E experts."""

import numpy as np

from ....moe.routes.rows import Array
from .predictor import Hint

SMALLEST = 0.02
"""Chances below this are no hints: 50 reads would bring one expert."""


def any_of(chances_NE: Array) -> Array:
    """Return the chance that at least one of the rows visits each expert, ``[E]``."""
    if len(chances_NE) == 1:
        return np.asarray(chances_NE[0])
    misses_E = np.prod(1 - chances_NE, axis=0)
    return np.asarray(1 - misses_E)


def best_hints(layer: int, chances_E: Array, width: int) -> list[Hint]:
    """Return hints for the ``width`` likeliest experts of a layer, the likeliest first."""
    if width < len(chances_E):
        best = np.argpartition(chances_E, -width)[-width:]
        best = best[np.argsort(-chances_E[best], kind="stable")]
    else:
        best = np.argsort(-chances_E, kind="stable")
    pairs = zip(best.tolist(), chances_E[best].tolist(), strict=True)
    return [Hint((layer, expert), chance) for expert, chance in pairs if chance >= SMALLEST]


def width_of(k: int, rows: int, distance: int) -> int:
    """Return how many experts to name: K and 2 more for one row, 2 fewer for each layer ahead."""
    return rows * max(1, k + 4 - 2 * distance)


def visits(experts_NK: Array, num_experts: int) -> Array:
    """Return how often each row visits each expert, ``[N, E]``; -1 is not counted."""
    rows = len(experts_NK)
    found_NE = np.zeros((rows, num_experts + 1), dtype=np.float32)
    found_NE[np.arange(rows)[:, None], experts_NK] = 1  # -1 is the last column
    return found_NE[:, :-1]
