"""What a prompt needed is kept while its answer is generated.

L MoE layers, E experts of a layer.
"""

import numpy as np

from ....moe.routes.rows import Phase
from ..forwards import Forward
from .policy import CacheFacts, Key
from .scored import Array, ScoredPolicy

PINNED_SHARE = 0.5
"""Of the slots, at most. Without a bound long prompts, which visit every expert, would pin all."""


class WorkingSet(ScoredPolicy):
    """Evicts the least recently needed expert outside the working sets of running answers.

    A sequence's working set are the experts that its prompt visited, weighted by the share of the
    prompt's rows that visited them. The weights of all sequences that generate are added, and the
    experts with the largest sums are pinned, as many as :data:`PINNED_SHARE` of the slots. If only
    pinned ones could leave, the least recently needed one of them does. A sequence ends when a
    forward comes without it.

    The idea is that of CoreInfer (arXiv 2410.18311), which keeps a prompt's neurons for its answer;
    here experts outside the set are read when they are needed, so nothing is lost. A forward with
    several prompts divides its visits by their rows, and rows that generate in the same forward
    count as the prompts'.
    """

    def __init__(self, facts: CacheFacts) -> None:
        super().__init__(facts)
        self._room = int(facts.num_slots * PINNED_SHARE)
        self._visits_LE = np.zeros(self._shape)
        """Of the forward that runs."""
        self._last: Forward | None = None
        self._shares_of: dict[int, Array] = {}
        """Sequence -> visits of its prompt."""
        self._pinning: set[int] = set()
        self._is_pinned_LE = np.zeros(self._shape)

    def begin(self, forward: Forward) -> None:
        """Book the visits of the last forward; pin for those who generate now."""
        super().begin(forward)
        self._book_last()
        self._last = forward
        here = set(forward.sequences)
        self._shares_of = {s: shares for s, shares in self._shares_of.items() if s in here}
        by_phase = zip(forward.sequences, forward.phases, strict=True)
        generating = {s for s, phase in by_phase if phase == Phase.DECODE} & set(self._shares_of)
        if generating != self._pinning:
            self._pinning = generating
            self._pin()

    def touch(self, key: Key, rows: int) -> None:
        """Count the rows of this forward."""
        super().touch(key, rows)
        self._visits_LE[self._now, key[1]] += rows

    def scores(self) -> Array:
        """Return 1 for pinned experts, 0 for the others; of equal ones the oldest leaves."""
        return self._is_pinned_LE

    def _book_last(self) -> None:
        """Divide the visits of the last forward among its prompts."""
        if self._last is not None:
            lengths = dict(zip(self._last.sequences, self._last.lengths, strict=True))
            by_phase = zip(self._last.sequences, self._last.phases, strict=True)
            prompts = [s for s, phase in by_phase if phase == Phase.PREFILL]
            total = sum(lengths[s] for s in prompts)
            for sequence in prompts:
                share = self._visits_LE * (lengths[sequence] / total)
                self._shares_of[sequence] = self._shares_of.get(sequence, 0) + share
        self._visits_LE[:] = 0

    def _pin(self) -> None:
        weights_LE = np.zeros(self._shape)
        for sequence in self._pinning:
            visits_LE = self._shares_of[sequence]
            weights_LE += visits_LE / max(1.0, visits_LE.sum())
        order = np.argsort(-weights_LE, axis=None, kind="stable")[: self._room]
        self._is_pinned_LE[:] = 0
        self._is_pinned_LE.ravel()[order[weights_LE.ravel()[order] > 0]] = 1
