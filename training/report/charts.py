"""Charts as inline SVG, written by hand: lines with dots, and stacked areas.

Coordinates are in a 400 x 240 box that the page scales. For tooltips, the script on the page
computes values from coordinates, so every line carries its name and every chart its scale.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .read import Point

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 22, 36
BUCKETS = 300
"""Longer lines are cut into this many stretches and keep the lowest and highest point of each."""
FEW_POINTS = 40
"""Lines of at most this many points show dots."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    color: int
    """Index into the page's palette."""
    is_faint: bool = False
    """Drawn thin and pale, and left out of the legend."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Data to coordinates."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        """Return the coordinate of a step."""
        share = (value - self.x0) / (self.x1 - self.x0)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        """Return the coordinate of a value."""
        share = (value - self.y0) / (self.y1 - self.y0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    floor: float | None = None,
    marks: Iterable[int] = (),
) -> str:
    """Return a figure; ``floor`` is a value the axis must show, ``marks`` are resumed steps."""
    lines = [line for line in lines if line.points]
    values = [y for line in lines for _, y in line.points]
    scale = _scale([x for line in lines for x, _ in line.points], values, floor)
    body = [_axes(scale, unit), _marks(scale, marks)]
    for line in lines:
        kept = thin(line.points)
        points = " ".join(f"{scale.x(x)},{scale.y(y)}" for x, y in kept)
        style = f"line c{line.color}" + (" faint" if line.is_faint else "")
        body.append(
            f'<polyline class="{style}" data-name="{escape(line.name)}" points="{points}"/>'
        )
        if len(kept) <= FEW_POINTS and not line.is_faint:
            body += [
                f'<circle class="dot c{line.color}" cx="{scale.x(x)}" cy="{scale.y(y)}" r="2.4"/>'
                for x, y in kept
            ]
    entries = [
        (line.color, line.name, short(line.points[-1][1])) for line in lines if not line.is_faint
    ]
    return _figure(title, entries, _svg(title, scale, body))


def stacked_chart(
    title: str,
    unit: str,
    steps: Sequence[int],
    layers: Sequence[tuple[str, Sequence[float], str]],
    marks: Iterable[int] = (),
) -> str:
    """Return a figure of areas on top of each other.

    ``layers`` are (name, value at each step, text for the legend), from the bottom up.
    """
    steps, layers = _average(steps, layers)
    if len(steps) == 1:  # one moment: a bar over the whole width
        steps = [steps[0] - 1, steps[0]]
        layers = [(name, [*values, *values], note) for name, values, note in layers]
    tops: list[list[float]] = []
    below = [0.0] * len(steps)
    for _, values, _ in layers:
        below = [low + value for low, value in zip(below, values, strict=True)]
        tops.append(below)
    scale = _scale(steps, [*tops[-1], 0.0], 0.0)
    body = [_axes(scale, unit)]
    floor = [0.0] * len(steps)
    for color, ((name, _, _), top) in enumerate(zip(layers, tops, strict=True)):
        upper = [f"{scale.x(x)},{scale.y(y)}" for x, y in zip(steps, top, strict=True)]
        lower = [f"{scale.x(x)},{scale.y(y)}" for x, y in zip(steps, floor, strict=True)]
        body.append(f'<polygon class="area c{color}" points="{" ".join(upper + lower[::-1])}"/>')
        body.append(
            f'<polyline class="edge" data-name="{escape(name)}" points="{" ".join(upper)}"/>'
        )
        floor = top
    body.append(_marks(scale, marks))
    entries = [(color, name, note) for color, (name, _, note) in enumerate(layers)]
    return _figure(title, entries, _svg(title, scale, body, is_stacked=True))


def thin(points: Sequence[Point]) -> list[Point]:
    """Keep the lowest and highest point of each bucket, and both ends."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    kept = {0, len(points) - 1}
    for bucket in range(BUCKETS):
        here = range(bucket * len(points) // BUCKETS, (bucket + 1) * len(points) // BUCKETS)
        kept |= {min(here, key=lambda i: points[i][1]), max(here, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return an exponential mean over about a fortieth of the points, unbiased at the start."""
    keep = 1 - 1 / max(1.0, len(points) / 40)
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total = keep * total + y
        weight = keep * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that cover ``low`` to ``high``, about ``count`` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def short(value: float) -> str:
    """Write a number in few characters: 12.3k, 0.042, 4e-04."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / (1000 if letter == "k" else limit)
            return f"{scaled:.4g}{letter}"
    if 0 < size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"


def _average(
    steps: Sequence[int], layers: Sequence[tuple[str, Sequence[float], str]]
) -> tuple[list[int], list[tuple[str, list[float], str]]]:
    """Thin areas by averaging, so that layers still add up."""
    size = -(-len(steps) // BUCKETS)
    starts = range(0, len(steps), size)
    last = [steps[min(start + size, len(steps)) - 1] for start in starts]
    return last, [
        (name, [sum(v) / len(v) for v in (values[s : s + size] for s in starts)], note)
        for name, values, note in layers
    ]


def _scale(xs: Sequence[float], ys: Sequence[float], floor: float | None) -> Scale:
    low, high = min(ys), max(ys)
    if floor is not None:
        low = min(low, floor)
    y_ticks = ticks(low, high)
    x0, x1 = min(xs), max(xs)
    return Scale(x0, x1 if x1 > x0 else x0 + 1, y_ticks[0], y_ticks[-1])


def _axes(scale: Scale, unit: str) -> str:
    parts = [f'<text class="unit" x="4" y="12">{escape(unit)}</text>']
    for value in ticks(scale.y0, scale.y1):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4}">{short(value)}</text>')
    for value in ticks(scale.x0, scale.x1):
        if scale.x0 <= value <= scale.x1 and value == int(value):
            x, y = scale.x(value), HEIGHT - BOTTOM
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{y}" y2="{y + 4}"/>')
            parts.append(f'<text class="tick mid" x="{x}" y="{y + 16}">{short(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="unit mid" x="{middle}" y="{HEIGHT - 4}">step</text>')
    return "".join(parts)


def _marks(scale: Scale, marks: Iterable[int]) -> str:
    inside = [scale.x(mark) for mark in marks if scale.x0 < mark < scale.x1]
    return "".join(
        f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for x in inside
    )


def _svg(title: str, scale: Scale, body: Sequence[str], *, is_stacked: bool = False) -> str:
    stacked = " data-stacked" if is_stacked else ""
    numbers = f"{scale.x0},{scale.x1},{scale.y0},{scale.y1}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-scale="{numbers}"{stacked}>{"".join(body)}</svg>'
    )


def _figure(title: str, entries: Sequence[tuple[int, str, str]], svg: str) -> str:
    legend = "".join(
        f'<li><i class="key c{color}"></i>{escape(name)} <b>{escape(value)}</b></li>'
        for color, name, value in entries
    )
    return f'<figure><h3>{escape(title)}</h3><ul class="legend">{legend}</ul>{svg}</figure>'
