"""Compare what a cost model predicts with what is measured while training."""

from .cost_model import FREE, OPERATIONS, CostModel, Linear


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

    ``r2`` by operation that happens, ``contention``, and :meth:`Comparison.take`.
    """
    lines: dict[str, Linear] = {name: getattr(model, name) for name in OPERATIONS}
    r2 = {name: line.r2 for name, line in lines.items() if line != FREE}
    return {"r2": r2, "contention": model.contention, "phases": comparison.take()}
