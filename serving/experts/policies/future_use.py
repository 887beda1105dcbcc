"""Learned from recorded routes: how soon and how often will an expert be needed again?

N forwards, L MoE layers, E experts of a layer, M means, F features.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from ..forwards import Forward
from ..recorded import RecordedForward
from .policy import CacheFacts, Key
from .scored import Array, ScoredPolicy

DISCOUNT = 0.8
"""What a need counts, compared with one a forward earlier."""
HALF_LIVES = (2.0, 8.0, 32.0, 128.0, 512.0)
"""Of the running means, in forwards."""
LAYERS_BEFORE = 2
"""Whose choices in the same forward are features, too."""
RIDGE = 30.0
"""Penalty of the squared weights, in forwards."""


class FutureUse(ScoredPolicy):
    """Evicts the expert with the smallest predicted future use.

    use = (1 - g) sum over n = 1, 2, ... of g^(n - 1) y_n, where y_n = 1 if the n-th forward from
    now needs the expert, and g = DISCOUNT: what Belady's rule knows, softened to something that can
    be predicted. A layer's uses are a linear function of the experts that its last forward needed,
    in this layer and in the two before it, and of running means of the needs of each expert.
    Weights are those of ridge regression on recorded routes.

    Cost, in addition to the base: a layer's turn is one product ``[F] x [F, E]`` with F about 8 E.
    Weights take ``L F E`` floats. Learning takes ``N F^2`` products for each layer, once.
    """

    def __init__(self, facts: CacheFacts, recorded: Iterable[RecordedForward]) -> None:
        super().__init__(facts)
        needs_LNE = _needs(list(recorded), self._shape)
        self._weights_L = [fit(needs_LNE, place) for place in range(self._shape[0])]
        """``[F, E]`` each; the last feature is always 1."""
        self._last_LE = np.zeros(self._shape, dtype=np.float32)
        """1 = needed in the layer's last forward."""
        self._means_LME = np.zeros(
            (self._shape[0], len(HALF_LIVES), self._shape[1]), dtype=np.float32
        )
        self._uses_LE = np.stack([weights_FE[-1] for weights_FE in self._weights_L])
        self._needs_now: list[int] = []
        """Of the layer that computes; empty once they are booked."""

    def begin(self, forward: Forward) -> None:
        """Predict for the last layer."""
        self._book()
        super().begin(forward)

    def touch(self, key: Key, rows: int) -> None:
        """Note a need; a new layer's first one ends the layer before."""
        if self._place_of[key[0]] != self._now:
            self._book()
        super().touch(key, rows)
        self._needs_now.append(key[1])

    def scores(self) -> Array:
        """Return predicted uses."""
        self._book()
        return self._uses_LE

    def _book(self) -> None:
        """Predict for the layer that has told all its needs."""
        if not self._needs_now:
            return
        place = self._now
        needs_E = np.zeros(self._shape[1], dtype=np.float32)
        needs_E[self._needs_now] = 1
        self._needs_now = []
        self._last_LE[place] = needs_E
        self._means_LME[place] += _RATES_M1 * (needs_E - self._means_LME[place])
        before = [self._last_LE[place - n] for n in _before(place)]
        features_F = np.concatenate([needs_E, *before, *self._means_LME[place], _ONE])
        self._uses_LE[place] = features_F @ self._weights_L[place]


_RATES_M1 = (1 - 2 ** (-1 / np.array(HALF_LIVES, dtype=np.float32)))[:, None]
_ONE = np.ones(1, dtype=np.float32)


def _before(place: int) -> Sequence[int]:
    """Return the distances of the layers before ``place`` that count."""
    return range(1, min(place, LAYERS_BEFORE) + 1)


def _needs(forwards: Sequence[RecordedForward], shape: tuple[int, int]) -> Array:
    num_layers, num_experts = shape
    needs_LNE = np.zeros((num_layers, len(forwards), num_experts), dtype=np.float32)
    for number, recorded in enumerate(forwards):
        for place, rows_of in enumerate(recorded.rows_of_L):
            needs_LNE[place, number, list(rows_of)] = 1
    return needs_LNE


def fit(needs_LNE: Array, place: int) -> Array:
    """Return a layer's weights ``[F, E]`` from what all layers needed."""
    needs_NE = needs_LNE[place]
    uses_NE, future_E = np.zeros_like(needs_NE), np.zeros_like(needs_NE[0])
    means_NME = np.zeros((len(needs_NE), len(HALF_LIVES), needs_NE.shape[1]), dtype=np.float32)
    mean_ME = np.zeros_like(means_NME[0])
    for number in range(len(needs_NE) - 1, -1, -1):
        uses_NE[number] = (1 - DISCOUNT) * future_E
        future_E = needs_NE[number] + DISCOUNT * future_E
    for number, needs_E in enumerate(needs_NE):
        mean_ME += _RATES_M1 * (needs_E - mean_ME)
        means_NME[number] = mean_ME
    before = [needs_LNE[place - n] for n in _before(place)]
    means = means_NME.reshape(len(needs_NE), -1)
    ones = np.ones((len(needs_NE), 1), dtype=np.float32)
    features_NF = np.concatenate([needs_NE, *before, means, ones], axis=1)
    squares_FF = features_NF.T @ features_NF + RIDGE * np.eye(features_NF.shape[1])
    weights: Array = np.linalg.solve(squares_FF, features_NF.T @ uses_NE).astype(np.float32)
    return weights
