"""What a run learns: the unit of its loss, and the curves of what else it measures, by objective.

A kind of data that measures more than its loss has a line in ``BY_FORMAT``.
"""

from collections.abc import Callable
from typing import NamedTuple

from .charts import Line, line_chart
from .pairs import pair_charts
from .read import Run
from .tasks import task_charts

NATS_PER_TOKEN = "nats per token"


class Measure(NamedTuple):
    """A chart of some series of ``metrics.jsonl``."""

    title: str
    unit: str
    lines: dict[str, str]
    """The series by the names of their lines."""
    floor: float | None = 0.0
    """A value that the axis must show."""


def _charts_of(*measures: Measure) -> Callable[[Run, list[int]], list[str]]:
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


class Learning(NamedTuple):
    """What the report shows of an objective."""

    unit: str
    """Of the loss."""
    charts: Callable[[Run, list[int]], list[str]] = _charts_of()
    """Return charts of a run's other measures; the steps are those of resumed starts."""


BY_FORMAT = {
    "classify": Learning(
        "nats per text",
        _charts_of(
            Measure(
                *("Labels of held-out texts", "share"),
                {"accuracy": "eval_accuracy", "macro F1": "eval_macro_f1"},
            )
        ),
    ),
    "pairs": Learning(
        NATS_PER_TOKEN,
        _charts_of(Measure("Held-out targets", "share", {"accuracy": "eval_accuracy"})),
    ),
    "series": Learning(
        "mean over windows",
        _charts_of(
            Measure(
                *("Errors of held-out forecasts", "standardised"),
                {"mean square": "eval_mse", "mean absolute": "eval_mae"},
            )
        ),
    ),
    "sessions": Learning(
        "nats per code",
        _charts_of(
            Measure(
                "Items of held-out sessions that were recommended",
                "share",
                {"recall": "eval_recall"},
            )
        ),
    ),
    "images": Learning("sum over tasks", task_charts),
    "super_resolution": Learning(
        "mean square",
        _charts_of(
            Measure("Held-out images, enlarged", "PSNR in dB", {"held out": "eval_psnr"}, None)
        ),
    ),
    "preference": Learning("nats per pair", pair_charts),
}
"""By ``data.format``; texts have their loss in nats per token, and no more."""


def learning_of(run: Run) -> Learning:
    """Return what the report shows of a run's objective."""
    of_format = run.config.get("data", {}).get("format")
    return BY_FORMAT.get(of_format, Learning(NATS_PER_TOKEN))
