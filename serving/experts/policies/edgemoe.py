"""EdgeMoE's rule: how often an expert is needed, and how soon its layer has its turn.

L MoE layers, E experts of a layer.
"""

import numpy as np

from .lfu import LeastFrequentlyUsed
from .scored import Array


class FrequencyOverDistance(LeastFrequentlyUsed):
    """Evicts the expert with the smallest f / d.

    f is the number of forwards that needed the expert, and d = (its layer - the layer that
    computes) mod L, in MoE layers: those just passed have the largest d and leave first. The layer
    that computes has d = 0 and stays while there is anything else.

    Source: EdgeMoE (arXiv 2308.14352). As printed there, the next layer gets the largest
    denominator, which contradicts the text, and d = 0 divides by zero. This is the rule of the
    text.
    """

    def scores(self) -> Array:
        """Return f / d; the layer that computes comes after all others."""
        scores_LE: Array = self._counts_LE / np.maximum(self._distances(), 1)
        scores_LE[self._now] += self._counts_LE.max()
        return scores_LE
