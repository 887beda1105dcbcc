"""Where a run's wall time goes.

Laps of one host clock, so that nothing is counted twice or left out and no device is waited for.
On a GPU the host runs ahead of its kernels: their time then shows in the phase that first needs a
result, which is ``backward`` (it reads the loss) or ``reduce`` (it reads the gradient norm).
"""

import time
from collections.abc import Callable
from typing import Literal, get_args

Phase = Literal[
    "data", "forward", "backward", "reduce", "optimizer", "evaluate", "log", "checkpoint"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order of a step. ``forward`` and ``backward`` include the expert all-to-all, ``backward``
the reduction that overlaps with it; ``reduce`` is what remains: experts, loss sums, norm, and dense
gradients where ranks share memory."""


class PhaseClock:
    """Seconds of each phase since the last ``start``."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.start()

    def start(self) -> None:
        """Forget everything and begin the first lap."""
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._lap_began = self._now()

    def lap(self, phase: Phase) -> None:
        """Give the time since the last lap to ``phase``."""
        now = self._now()
        self.seconds[phase] += now - self._lap_began
        self._lap_began = now


class PhaseAverage:
    """Mean seconds per step of each phase since the last record."""

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock
        self._before = dict(clock.seconds)
        self._steps = 0

    def count_step(self) -> None:
        """Take one more step into the mean."""
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Return the means and begin anew."""
        now, before, steps = dict(self._clock.seconds), self._before, self._steps
        self._before, self._steps = now, 0
        return {phase: (now[phase] - before[phase]) / steps for phase in PHASES}
