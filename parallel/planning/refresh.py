"""Keep a cost model true while training, and compare what it predicts with what is measured."""

from collections import deque
from dataclasses import replace
from statistics import median

from .cost_model import FREE, OPERATIONS, CostModel, Linear, Operation, Sample, fit

SPREAD = 2.0
"""Largest over smallest size from which a line can be fitted to new samples alone."""
MIN_SAMPLES = 8


class Refresh:
    """A cost model, and the last samples of each operation, seen while training.

    Ranks that decide alike must add the same samples: the slowest rank's seconds.
    """

    def __init__(self, model: CostModel, window: int = 128) -> None:
        self._model = model
        self._window = window
        self._samples: dict[Operation, deque[Sample]] = {}

    def add(self, operation: Operation, size: float, seconds: float) -> None:
        """Note one operation; the oldest of more than ``window`` is forgotten."""
        samples = self._samples.setdefault(operation, deque(maxlen=self._window))
        samples.append((size, seconds))

    def model(self) -> CostModel:
        """Return the model that the samples ask for.

        Operations with fewer than 8 samples keep their line. Sizes that differ enough get a new
        line. Sizes that are much alike, as in a run with steady loads, cannot tell alpha from beta:
        they scale the line by the median of measured over predicted.
        """
        lines = {}
        for name, samples in self._samples.items():
            if len(samples) >= MIN_SAMPLES:
                lines[name] = _refreshed(getattr(self._model, name), list(samples))
        return replace(self._model, **lines)


def _refreshed(line: Linear, samples: list[Sample]) -> Linear:
    sizes = [size for size, _ in samples]
    if line == FREE or max(sizes) >= SPREAD * min(sizes):
        return fit(samples) if len(set(sizes)) > 1 else line
    return line.scaled(median(seconds / line.seconds(size) for size, seconds in samples))


class Comparison:
    """Predicted and measured seconds of phases, as means since the last :meth:`take`."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float, int]] = {}

    def add(self, phase: str, predicted_s: float, measured_s: float) -> None:
        """Note one run of a phase."""
        predicted, measured, count = self._sums.get(phase, (0.0, 0.0, 0))
        self._sums[phase] = (predicted + predicted_s, measured + measured_s, count + 1)

    def take(self) -> dict[str, dict[str, float]]:
        """Return ``predicted_s``, ``measured_s`` and ``relative_error`` by phase; start over.

        The error is ``predicted / measured - 1``: above 0 when the model is too slow.
        """
        sums, self._sums = self._sums, {}
        return {
            phase: {
                "predicted_s": predicted / count,
                "measured_s": measured / count,
                "relative_error": predicted / measured - 1,
            }
            for phase, (predicted, measured, count) in sums.items()
        }


def record_of(model: CostModel, comparison: Comparison) -> dict[str, object]:
    """Return what a record of ``metrics.jsonl`` holds about the cost model, for observers.

    ``r2`` by operation that happens, and :meth:`Comparison.take`.
    """
    lines: dict[str, Linear] = {name: getattr(model, name) for name in OPERATIONS}
    r2 = {name: line.r2 for name, line in lines.items() if line != FREE}
    return {"r2": r2, "phases": comparison.take()}
