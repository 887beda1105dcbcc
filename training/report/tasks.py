"""The curves of runs with several tasks on images: a chart for each kind of measure."""

from .charts import Line, line_chart
from .read import Run

CHARTS = (
    ("Held-out labels and classes of pixels", "share", ("eval_accuracy_", "eval_miou_")),
    ("Held-out values of pixels", "root of the mean squared error", ("eval_rmse_",)),
)
"""Title, unit and the beginnings of the measures' names."""


def task_charts(run: Run, marks: list[int]) -> list[str]:
    """Return a chart for each kind of measure that the run has; none for runs without tasks."""
    charts = []
    for title, unit, beginnings in CHARTS:
        names = [name for name in run.series if name.startswith(beginnings)]
        lines = [Line(_words(name), run.series[name], number) for number, name in enumerate(names)]
        if lines:
            charts.append(line_chart(title, unit, lines, floor=0.0, marks=marks))
    return charts


def _words(name: str) -> str:
    _, measure, task = name.split("_", 2)
    kinds = {"accuracy": "accuracy", "miou": "mean IoU", "rmse": "error"}
    return f"{task}, {kinds[measure]}"
