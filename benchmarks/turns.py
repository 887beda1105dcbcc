"""Arms of a benchmark that take turns in one process."""

import statistics
import time
from collections.abc import Callable


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each run, after one turn that does not count.

    A run returns its seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    return {name: statistics.median(found) for name, found in times.items()}


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """Return a run that returns the seconds of its call."""

    def timed_run() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return timed_run
