"""MoE-Infinity's rule: what requests like the current ones visited, and how soon.

L MoE layers, E experts of a layer, C past requests.
"""

import numpy as np

from ..forwards import Forward
from .policy import CacheFacts, Key
from .scored import Array, ScoredPolicy

CAPACITY = 64
"""Past requests that are remembered."""
PRIOR_ROWS = 8.0
"""How many rows of the current requests the most similar past one is worth."""
SMALLEST_SHARE = 1e-8


class ActivationTracing(ScoredPolicy):
    """Evicts the expert with the smallest share x proximity x visits.

    - A request's activation matrix (EAM) has the rows that visited each expert. Those of running
      requests are added to c; m is the most similar one of past requests, as shares of each layer's
      visits. share = (c + w m + 1e-8) / (sum of c over the layer + w) with w = PRIOR_ROWS: a new
      request follows its precursor, a longer one itself.
    - proximity = 1 - d / (L + 1), where d = (expert's layer - the layer that computes) mod L.
    - visits = number of forwards that needed the expert.

    The most similar matrix has the largest mean cosine over the layers that the running requests
    have visited so far. A request that ends, because a forward comes without it, joins the past
    ones. A full memory drops its entry that is most similar to the new one, so it stays varied.

    Source: MoE-Infinity (arXiv 2401.14361). The paper evicts by the request's shares alone and uses
    past requests for prefetching; here they fill in for what a short request has not shown yet.

    Cost, in addition to the base: a forward compares C matrices, ``C L E`` products. The first
    forward of a request does so once per layer. A forward of several requests divides its visits by
    their rows.
    """

    def __init__(self, facts: CacheFacts) -> None:
        super().__init__(facts)
        self._visits_LE = np.zeros(self._shape)
        self._rows_LE = np.zeros(self._shape)
        """Of the forward that runs."""
        self._last: Forward | None = None
        self._rows_of: dict[int, Array] = {}
        """Running sequence -> its matrix, without the forward that runs."""
        self._running_LE = np.zeros(self._shape)
        """The sum of those."""
        self._past_CLE = np.zeros((0, *self._shape), dtype=np.float32)
        """Each layer's row has length 1, or 0 if it was not visited."""
        self._similar_LE = np.zeros(self._shape)
        """Shares of the most similar past request."""

    def begin(self, forward: Forward) -> None:
        """Book the visits of the last forward, and remember the requests that have ended."""
        super().begin(forward)
        self._book_last()
        self._last = forward
        for sequence in self._rows_of.keys() - set(forward.sequences):
            self._remember(self._rows_of.pop(sequence))
        self._running_LE = np.zeros(self._shape)
        for sequence in forward.sequences:
            self._running_LE += self._rows_of.get(sequence, 0)
        self._find_similar()

    def touch(self, key: Key, rows: int) -> None:
        """Count the need and its rows."""
        before = self._now
        super().touch(key, rows)
        is_new_layer = self._now != before
        if is_new_layer and not self._running_LE[self._now].any():
            self._find_similar()  # the first forward of a request shows itself layer by layer
        self._visits_LE[self._now, key[1]] += 1
        self._rows_LE[self._now, key[1]] += rows

    def scores(self) -> Array:
        """Return share x proximity x visits."""
        rows_LE = self._running_LE + self._rows_LE
        totals_L1 = rows_LE.sum(axis=1, keepdims=True) + PRIOR_ROWS
        shares_LE = (rows_LE + PRIOR_ROWS * self._similar_LE + SMALLEST_SHARE) / totals_L1
        scores_LE: Array = shares_LE * self._visits_LE
        scores_LE *= 1 - self._distances() / (self._shape[0] + 1)
        return scores_LE

    def _book_last(self) -> None:
        """Divide the rows of the last forward among its sequences."""
        if self._last is not None:
            total = sum(self._last.lengths)
            for sequence, length in zip(self._last.sequences, self._last.lengths, strict=True):
                rows_LE = self._rows_LE * (length / max(1, total))
                self._rows_of[sequence] = self._rows_of.get(sequence, 0) + rows_LE
        self._rows_LE[:] = 0

    def _remember(self, rows_LE: Array) -> None:
        new_LE = _unit_rows(rows_LE)
        if len(self._past_CLE) < CAPACITY:
            self._past_CLE = np.concatenate([self._past_CLE, new_LE[None]])
            return
        self._past_CLE[np.einsum("cle,le->c", self._past_CLE, new_LE).argmax()] = new_LE

    def _find_similar(self) -> None:
        """Find the past request that is most like the running ones, in the layers seen so far."""
        if not len(self._past_CLE):
            return
        seen_LE = _unit_rows(self._running_LE + self._rows_LE)
        similarity_C = self._past_CLE.reshape(len(self._past_CLE), -1) @ seen_LE.ravel()
        similar_LE = self._past_CLE[similarity_C.argmax()].astype(np.float64)
        totals_L1 = similar_LE.sum(axis=1, keepdims=True)
        self._similar_LE = similar_LE / np.maximum(totals_L1, SMALLEST_SHARE)


def _unit_rows(rows_LE: Array) -> Array:
    lengths_L1 = np.linalg.norm(rows_LE, axis=1, keepdims=True)
    unit_LE: Array = (rows_LE / np.maximum(lengths_L1, SMALLEST_SHARE)).astype(np.float32)
    return unit_LE
