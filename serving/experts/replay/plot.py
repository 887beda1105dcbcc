"""The picture of a comparison as SVG: how far each policy is from the bound."""

from collections.abc import Sequence
from html import escape

from .comparison import Outcome

WIDTH, PANEL, TOP, LEFT, BOTTOM, LINE = 720, 300, 70, 64, 56, 18
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#997700", "#bbbbbb")
"""Paul Tol's bright colours, which also the colour-blind tell apart."""
STEPS = 5
"""Of the axis."""


def plot(outcomes: Sequence[Outcome], title: str) -> str:
    """Return a group of bars for each number of slots; a bar's height is its gap to Belady."""
    names = list(dict.fromkeys(_name(outcome) for outcome in outcomes))
    groups = list(dict.fromkeys(outcome.setting.num_slots for outcome in outcomes))
    highest = max(1.0, *(outcome.gap for outcome in outcomes)) * 1.08
    floor, width = TOP + PANEL, (WIDTH - LEFT - 16) / len(groups)
    height = floor + BOTTOM + LINE * (len(names) + 1) // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>',
        '<text x="12" y="40" fill="#555">Experts that compute waits for, over the misses of '
        "Belady's rule; lower is better, and the line is the bound.</text>",
    ]
    for step in range(STEPS + 1):
        value, y = highest * step / STEPS, floor - PANEL * step / STEPS
        parts.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH - LEFT - 16}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for outcome in outcomes:
        place = names.index(_name(outcome))
        bar = 0.9 * width / len(names)
        left = LEFT + width * (groups.index(outcome.setting.num_slots) + 0.05) + bar * place
        size = PANEL * outcome.gap / highest
        parts.append(
            f'<rect x="{left:.1f}" y="{floor - size:.1f}" width="{0.9 * bar:.1f}" '
            f'height="{size:.1f}" fill="{_color(place)}"><title>{escape(_name(outcome))}: '
            f"{outcome.gap:.3f}</title></rect>"
        )
    for number, slots in enumerate(groups):
        x = LEFT + width * (number + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{slots}</text>')
    bound = floor - PANEL / highest
    parts.append(f'<path d="M{LEFT} {bound:.1f}h{WIDTH - LEFT - 16}" stroke="black"/>')
    parts.append(f'<text x="{LEFT}" y="{floor + 34}" fill="#555">slots</text>')
    for place, name in enumerate(names):
        x, y = LEFT + 320 * (place % 2), floor + BOTTOM + LINE * (place // 2)
        parts.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{_color(place)}"/>')
        parts.append(f'<text x="{x + 16}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _name(outcome: Outcome) -> str:
    setting = outcome.setting
    return (
        setting.policy if setting.predictor == "none" else f"{setting.policy}, {setting.predictor}"
    )


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]
