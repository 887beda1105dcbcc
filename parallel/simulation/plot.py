"""The picture of a simulation as SVG: where a step's time goes, and what a rank's memory holds."""

import math
from collections.abc import Sequence
from html import escape

from .step import Prediction

WIDTH, PANEL, TOP, BOTTOM, LEFT = 900, 300, 64, 44, 64
STEPS = 5
"""Of an axis."""
COLORS = ("#4477aa", "#66ccee", "#bbbbbb", "#997700", "#cc3311", "#228833", "#ee6677", "#aa3377")
"""Paul Tol's bright and high-contrast colours, which also the colour-blind tell apart."""
PARTS = {
    "attention": "attention",
    "experts": "experts",
    "other": "routers, norms, dense MLPs",
    "recompute": "computed again",
    "head": "head and loss",
    "update": "update",
    "rows": "waiting for rows",
    "gradients": "waiting for gradients",
    "latency": "fixed",
}
ORDER = ("attention", "experts", "other", "recompute", "head", "update", "latency")
WAITING = ("rows", "gradients")
KINDS = ("weights", "masters", "gradients", "moments", "activations", "buffers", "copies")


def plot(found: Sequence[Prediction], title: str) -> str:
    """Return a bar for each number of GPUs: seconds on the left, bytes on the right."""
    seconds = [{name: p.parts_s[name] * 1000 for name in (*ORDER, *WAITING)} for p in found]
    memory = [{kind: getattr(p.memory, kind) / 1e9 for kind in KINDS} for p in found]
    limit = found[0].cluster.gpu.memory / 1e9
    room = limit - found[0].cluster.gpu.reserved / 1e9
    names = [str(p.fold.world.size) for p in found]
    tops = [f"{p.utilisation:.0%}" for p in found]
    height = TOP + PANEL + BOTTOM + 20 * 5
    half = WIDTH // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>',
        '<text x="12" y="38" fill="#555">Predicted; nothing was measured.</text>',
        _bars("ms a step (above: MFU)", 0, seconds, names, tops, None),
        _bars("GB of a rank (line: what it has)", half, memory, names, None, room),
        _legend(0, [PARTS[name] for name in (*ORDER, *WAITING)]),
        _legend(half, list(KINDS)),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _bars(
    unit: str,
    start: int,
    columns: Sequence[dict[str, float]],
    names: Sequence[str],
    tops: Sequence[str] | None,
    line: float | None,
) -> str:
    """Return stacked bars in one half of the picture."""
    highest = max([sum(column.values()) for column in columns] + ([line] if line else []))
    step = _round_step(highest * 1.08 or 1.0)
    highest = STEPS * step
    width = (WIDTH // 2 - LEFT - 16) / len(columns)
    floor = TOP + PANEL
    parts = [f'<text x="{start + 12}" y="{TOP - 6}">{escape(unit)}</text>']
    for number in range(STEPS + 1):
        value, y = step * number, floor - PANEL * number / STEPS
        parts.append(f'<path d="M{start + LEFT} {y:.1f}h{WIDTH // 2 - LEFT - 16}" stroke="#ddd"/>')
        text = f'<text x="{start + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,g}</text>'
        parts.append(text)
    for number, column in enumerate(columns):
        x, y = start + LEFT + width * (number + 0.15), float(floor)
        middle = x + 0.35 * width
        for color, (name, value) in enumerate(column.items()):
            size = PANEL * value / highest
            y -= size
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{0.7 * width:.1f}" height="{size:.1f}" '
                f'fill="{_color(color)}"><title>{escape(name)}: {value:.4g}</title></rect>'
            )
        if tops is not None:
            text = f'<text x="{middle:.1f}" y="{y - 4:.1f}" text-anchor="middle">{tops[number]}'
            parts.append(f"{text}</text>")
        text = f'<text x="{middle:.1f}" y="{floor + 16}" text-anchor="middle">{names[number]}'
        parts.append(f"{text}</text>")
    if line is not None:
        y = floor - PANEL * line / highest
        parts.append(
            f'<path d="M{start + LEFT} {y:.1f}h{WIDTH // 2 - LEFT - 16}" stroke="black" '
            'stroke-dasharray="5 3"/>'
        )
    parts.append(f'<text x="{start + LEFT}" y="{floor + 34}" fill="#555">GPUs</text>')
    return "\n".join(parts)


def _round_step(highest: float) -> float:
    """Return a round number of which :data:`STEPS` reach ``highest``."""
    power = 10.0 ** math.floor(math.log10(highest / STEPS))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * STEPS >= highest)


def _legend(start: int, names: Sequence[str]) -> str:
    """Return colours with their names, two in a row."""
    parts = []
    for number, name in enumerate(names):
        x = start + 24 + 200 * (number % 2)
        y = TOP + PANEL + BOTTOM + 18 * (number // 2)
        parts.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{_color(number)}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 10}">{escape(name)}</text>')
    return "\n".join(parts)


def _color(number: int) -> str:
    return (*COLORS, "#dddddd")[number % (len(COLORS) + 1)]
