"""Try what should be fastest in real steps, and keep what is.

A cost model knows a link and experts, but not all that happens between them. So the best few of its
candidates take turns for some steps, and the fastest one stays.

N candidates, S steps of each.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Candidate = TypeVar("Candidate")

STEPS = 5
"""Of each candidate; their median counts."""
MARGIN = 0.05
"""Share of the first candidate's seconds that another one must save to replace it."""


class Trials(Generic[Candidate]):
    """Candidates that take turns, step by step. All ranks make the same calls.

    The first candidate stays unless another one is faster by more than noise.
    ``largest`` returns the element-wise maximum of a tensor over all ranks: a step takes as long as
    its slowest rank, and all ranks decide alike.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        largest: Callable[[Tensor], Tensor],
        steps: int = STEPS,
    ) -> None:
        self._candidates, self._largest, self._steps = list(candidates), largest, steps
        self._seconds: list[float] = []
        """In the order of steps."""
        self.best: Candidate | None = candidates[0] if len(candidates) == 1 else None
        """The fastest one, once all have had their turns."""

    @property
    def current(self) -> Candidate:
        """What the next step runs with."""
        if self.best is not None:
            return self.best
        return self._candidates[len(self._seconds) % len(self._candidates)]

    def note(self, seconds: float) -> None:
        """Tell how long the step took on this rank; the last turn decides."""
        if self.best is not None:
            return
        self._seconds.append(seconds)
        count = len(self._candidates)
        if len(self._seconds) == count * self._steps:
            seconds_SN = torch.tensor(self._seconds, dtype=torch.float64).view(-1, count)
            median_N = self._largest(seconds_SN).median(dim=0).values
            fastest = int(median_N.argmin())
            is_clear = median_N[fastest] < (1 - MARGIN) * median_N[0]
            self.best = self._candidates[fastest if is_clear else 0]
