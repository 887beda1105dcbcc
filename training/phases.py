"""Where a run's wall time goes.

Phases are laps of one host clock: nothing is counted twice or left out, and no phase waits for the
device. On a GPU the host runs ahead of its kernels. Their time then shows in the phase that first
needs a result: ``backward`` (reads the loss) or ``reduce`` (reads the gradient norm).
"""

import time
from collections.abc import Callable
from typing import Literal, get_args

Phase = Literal[
    "data", "forward", "backward", "reduce", "optimizer", "evaluate", "log", "checkpoint"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order of a step. ``forward`` and ``backward`` include the expert all-to-all; ``backward``
also includes the reduction that overlaps with it. ``reduce`` is the rest: experts, loss sums, norm,
and dense gradients if ranks share memory."""


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
        """Add the time since the last lap to ``phase``."""
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
        """Count one more step for the mean."""
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Return the means and start over."""
        now, before, steps = dict(self._clock.seconds), self._before, self._steps
        self._before, self._steps = now, 0
        return {phase: (now[phase] - before[phase]) / steps for phase in PHASES}
