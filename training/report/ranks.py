"""Charts about ranks that share experts: chunks of a layer, predicted seconds, copies."""

from collections.abc import Iterable

from .charts import Line, line_chart
from .read import Run

PHASES = ("forward", "backward")


def rank_charts(run: Run, marks: Iterable[int]) -> str:
    """Return the charts that the run's records have something for, as HTML."""
    return _schedule(run, list(marks)) + _copies(run, list(marks))


def _schedule(run: Run, marks: list[int]) -> str:
    series = run.series
    if "schedule/chunks" not in series:
        return ""
    ways = [
        Line("forward", series["schedule/chunks"], 0),
        Line("backward", series["schedule/backward_chunks"], 1),
    ]
    times: list[Line] = []
    for phase in PHASES:
        for kind in ("measured", "predicted"):
            points = series.get(f"schedule/phases/{phase}/{kind}_s", [])
            in_ms = [(step, 1000 * value) for step, value in points]
            times.append(Line(f"{phase}, {kind}", in_ms, len(times)))
    operations = [name for name in series if name.startswith("schedule/r2/")]
    fits = [
        Line(name.rpartition("/")[2], series[name], place) for place, name in enumerate(operations)
    ]
    return (
        line_chart("Chunks of a layer's rows", "messages", ways, floor=1.0, marks=marks)
        + line_chart("Time of a layer", "ms, rank 0", times, floor=0.0, marks=marks)
        + line_chart("Fit of the cost model", "r2 by operation", fits, floor=1.0, marks=marks)
    )


def _copies(run: Run, marks: list[int]) -> str:
    series = run.series
    if "copies/share" not in series:
        return ""
    shares = [
        Line("without copies", series["copies/share_without"], 3),
        Line("with copies", series["copies/share"], 0),
    ]
    numbers = [
        Line("copies", series["copies/number"], 0),
        Line("experts with another owner", series["copies/moved"], 1),
    ]
    return line_chart(
        "Largest rank's share of rows", "1 = perfect balance", shares, floor=1.0, marks=marks
    ) + line_chart("Copies of experts", "all ranks and layers", numbers, floor=0.0, marks=marks)
