"""FSMoE's gradient partition in its two steps, as an oracle: free windows, then evolution."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import differential_evolution

from moeyard.parallel.planning.cost_model import Linear
from moeyard.parallel.planning.gradient_partition import Stage


def two_steps(stages: Sequence[Stage], line: Linear, seed: int, generations: int) -> float:
    """Return the seconds of backward, with what remains sent at its end."""
    sent, ready = [], 0.0
    for stage in stages:
        plain = stage.best(0.0)
        window_s = plain.seconds - plain.busy_s
        room = max(0.0, (window_s - line.alpha) / line.beta)
        sent.append(min(room, ready - sum(sent)))
        ready += stage.new_bytes
    filled = np.array(sent)
    rest = ready - filled.sum()
    # What a stage may send in all is bounded by what exists before it.
    exists = np.cumsum([0, *(stage.new_bytes for stage in stages[:-1])])

    def added(shares: np.ndarray) -> np.ndarray:
        return rest * shares / max(1.0, shares.sum())

    def seconds(shares: np.ndarray) -> float:
        all_bytes = filled + added(shares)
        late = np.maximum(0, np.cumsum(all_bytes) - exists).max()
        if late > 1:
            return 1e3 + late
        return total_s(stages, line, all_bytes)

    bounds = [(0, 1)] * len(stages)
    found = differential_evolution(seconds, bounds, seed=seed, maxiter=generations, tol=0)
    return min(total_s(stages, line, filled), float(found.fun))


def total_s(stages: Sequence[Stage], line: Linear, sent: Sequence[float]) -> float:
    """Return the seconds of all stages and of what is left."""
    times = [line.seconds(number) for number in sent]
    rest = max(0.0, sum(stage.new_bytes for stage in stages) - sum(sent))
    all_s = sum(s.best(t).seconds_with(t) for s, t in zip(stages, times, strict=True))
    return all_s + line.seconds(rest if rest > 1 else 0)
