"""The curves of what a run measures besides its loss, by the kind of its data.

One that measures something has a line in ``CHARTS``.
"""

from collections.abc import Callable
from typing import NamedTuple

from .charts import Line, line_chart
from .pairs import pair_charts
from .read import Run
from .tasks import task_charts

Charts = Callable[[Run, list[int]], list[str]]
"""What draws a run's other measures; the steps are those of resumed starts."""


class Measure(NamedTuple):
    """A chart of some series of ``metrics.jsonl``."""

    title: str
    unit: str
    lines: dict[str, str]
    """The series by the names of their lines."""
    floor: float | None = 0.0
    """A value that the axis must show."""


def _charts_of(*measures: Measure) -> Charts:
    def charts(run: Run, marks: list[int]) -> list[str]:
        found = []
        for measure in measures:
            lines = [
                Line(name, run.series[key], number)
                for number, (name, key) in enumerate(measure.lines.items())
                if key in run.series
            ]
            if lines:
                title, unit, floor = measure.title, measure.unit, measure.floor
                found.append(line_chart(title, unit, lines, floor=floor, marks=marks))
        return found

    return charts


CHARTS: dict[str, Charts] = {
    "classify": _charts_of(
        Measure(
            *("Labels of held-out texts", "share"),
            {"accuracy": "eval_accuracy", "macro F1": "eval_macro_f1"},
        )
    ),
    "pairs": _charts_of(Measure("Held-out targets", "share", {"accuracy": "eval_accuracy"})),
    "series": _charts_of(
        Measure(
            *("Errors of held-out forecasts", "standardised"),
            {"mean square": "eval_mse", "mean absolute": "eval_mae"},
        )
    ),
    "sessions": _charts_of(
        Measure(
            *("Items of held-out sessions that were recommended", "share"),
            {"recall": "eval_recall"},
        )
    ),
    "images": task_charts,
    "super_resolution": _charts_of(
        Measure("Held-out images, enlarged", "PSNR in dB", {"held out": "eval_psnr"}, None)
    ),
    "preference": pair_charts,
}
"""By ``data.format``; texts have their loss and no more."""


def measure_charts(run: Run, marks: list[int]) -> list[str]:
    """Return the charts of a run's other measures; ``marks`` are the steps of resumed starts."""
    draw = CHARTS.get(run.config.get("data", {}).get("format"), _charts_of())
    return draw(run, marks)
