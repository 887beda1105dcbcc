"""Put the page together."""

import math
import statistics
from html import escape
from pathlib import Path

from ...errors import ConfigError
from ...files import replace_text
from ..phases import PHASES
from .cards import facts
from .charts import (
    BOTTOM,
    BUCKETS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    line_chart,
    smooth,
    stacked_chart,
)
from .heat import heat_map
from .learning import measure_charts
from .look import SCRIPT, STYLE
from .ranks import rank_charts
from .read import Run, read_run
from .words import data_of, model_of

MAX_LAYER_LINES = 8
"""With more MoE layers, the chart shows the worst, the median and the best of them."""


def write_report(run_dir: Path, out: Path | None) -> tuple[Path, str | None]:
    """Write the page (by default ``RUN_DIR/report.html``); return its path and what was damaged.

    Raises :class:`ConfigError` for a folder that is not a run or has no metrics, and for an ``out``
    that cannot be written.
    """
    run = read_run(run_dir)
    path = out or run_dir / "report.html"
    try:
        replace_text(path, render(run))
    except OSError as error:
        raise ConfigError(
            f"report {path} cannot be written ({error.strerror}); choose another with -o."
        ) from None
    return path, run.damage


def render(run: Run) -> str:
    """Return the page as HTML that loads nothing from elsewhere."""
    box = f"[{LEFT}, {WIDTH - RIGHT}, {TOP}, {HEIGHT - BOTTOM}]"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{escape(run.name)} - moeyard report</title>
<style>{STYLE}</style></head><body><main>
<h1>{escape(run.name)}</h1>{_notes(run)}{facts(run)}
<h2>Curves</h2><div class="charts">{_learning(run)}{_imbalance(run)}{_time(run)}</div>
{_ranks(run)}{_load(run)}
<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>
</main><script>{SCRIPT.replace("BOX", box)}</script></body></html>
"""


def _notes(run: Run) -> str:
    steps = run.config.get("train", {}).get("steps", "?")
    records = "one record" if run.num_records == 1 else f"{run.num_records:,} records"
    notes = [f"Step {run.last['step']:,} of {steps}, {records}."]
    if run.num_records > 2 * BUCKETS:
        notes.append(
            f"Long curves are thinned to the lowest and the highest value in each of "
            f"{BUCKETS} stretches."
        )
    if 1 < len(run.frames) < run.num_records:
        notes.append(f"The heat map has {len(run.frames)} moments.")
    if _marks(run):
        notes.append("Dashed lines: the run was resumed there.")
    text = f'<p class="note">{" ".join(notes)}</p>'
    return text + (f'<p class="warn">{escape(run.damage)}</p>' if run.damage else "")


def _marks(run: Run) -> list[int]:
    return sorted({start["step"] for start in run.starts if start.get("step")})


def _learning(run: Run) -> str:
    marks, series = _marks(run), run.series
    losses = [Line("training", series["loss"], 0)]
    if len(series["loss"]) > 40:
        losses = [
            Line("training, each record", series["loss"], 0, is_faint=True),
            Line("training, smoothed", smooth(series["loss"]), 0),
        ]
    losses.append(Line("held out", series.get("eval_loss", []), 1))
    charts = [line_chart("Loss", data_of(run).loss_unit, losses, marks=marks)]
    charts += measure_charts(run, marks)
    if norms := series.get("grad_norm"):
        lines = [Line("gradient norm", norms, 2)]
        clip = run.config.get("optimizer", {}).get("clip_norm", math.inf)
        if max(y for _, y in norms) >= clip:
            ends = sorted({norms[0][0], norms[-1][0]})
            lines.append(Line("clipped above", [(x, clip) for x in ends], 3))
        charts.append(
            line_chart("Gradient norm", "2-norm before clipping", lines, floor=0.0, marks=marks)
        )
    if rates := series.get("lr"):
        lines = [Line("learning rate", rates, 4)]
        charts.append(line_chart("Learning rate", "per step", lines, floor=0.0, marks=marks))
    return "".join(charts)


def _time(run: Run) -> str:
    marks, charts = _marks(run), []
    if speeds := run.series.get("tokens_per_s"):
        lines = [Line("all ranks together", speeds, 5)]
        charts.append(
            line_chart(
                "Speed", f"{model_of(run).row_names} per second", lines, floor=0.0, marks=marks
            )
        )
    if run.phases:
        steps = [step for step, _ in run.phases]
        weights = [b - a for a, b in zip([0, *steps[:-1]], steps, strict=True)]
        means = {
            phase: sum(w * p.get(phase, 0.0) for w, (_, p) in zip(weights, run.phases, strict=True))
            / max(1, sum(weights))
            for phase in PHASES
        }
        total = sum(means.values()) or 1.0
        layers = [
            (
                phase,
                [1000 * phases.get(phase, 0.0) for _, phases in run.phases],
                f"{1000 * means[phase]:.3g} ms, {100 * means[phase] / total:.0f}%",
            )
            for phase in PHASES
        ]
        charts.append(
            stacked_chart("Where a step's time goes", "ms per step, rank 0", steps, layers, marks)
        )
    return "".join(charts)


def _ranks(run: Run) -> str:
    charts = rank_charts(run, _marks(run))
    return f'<h2>Experts on ranks</h2><div class="charts">{charts}</div>' if charts else ""


def _load(run: Run) -> str:
    if not run.imbalance:
        return ""
    return f"<h2>Expert load</h2>{heat_map(run.frames, run.layers)}{_load_table(run)}"


def _imbalance(run: Run) -> str:
    if not run.imbalance:
        return ""
    if len(run.layers) <= MAX_LAYER_LINES:
        lines = [
            Line(f"layer {layer}", [(step, row[place]) for step, row in run.imbalance], place)
            for place, layer in enumerate(run.layers)
        ]
    else:
        lines = [
            Line(f"{name} layer", [(step, choose(row)) for step, row in run.imbalance], color)
            for name, choose, color in (
                ("worst", max, 3),
                ("median", statistics.median, 0),
                ("best", min, 2),
            )
        ]
    return line_chart(
        "Largest over mean load", "1 = perfect balance", lines, floor=1.0, marks=_marks(run)
    )


def _load_table(run: Run) -> str:
    experts = len(run.last["expert_tokens"][0])
    rows = "".join(
        f"<tr><td>{layer}</td><td>{load['max_over_mean']:.3f}</td><td>{load['max_violation']:.3f}"
        f"</td><td>{load['cv']:.3f}</td><td>{load['idle']} of {experts}</td>"
        f"<td>{load['entropy']:.3f} of {math.log(experts):.3f}</td><td>{load['dropped']}</td></tr>"
        for layer, load in zip(run.layers, run.last["load"], strict=True)
    )
    return (
        f"<h2>Load at step {run.last['step']:,}</h2>"
        '<p class="note">One batch. MaxVio is max/mean - 1; CV the standard deviation over the '
        "mean; entropy in nats, of the most there can be; dropped are rows that no expert took."
        '</p><div class="scroll"><table><tr><th>layer</th><th>max/mean</th><th>MaxVio</th>'
        f"<th>CV</th><th>idle experts</th><th>entropy</th><th>dropped</th></tr>{rows}</table></div>"
    )
