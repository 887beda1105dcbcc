"""The picture of benchmarks/routers.py: each router's loss with its three seeds, as SVG."""

from html import escape

LEFT, RIGHT, TOP, ROW = 190, 40, 34, 20
WIDTH = 760


def plot(rows: list[dict]) -> str:
    """Return a dot plot, best router first: small dots are seeds, the large one is their mean."""
    losses = [loss for row in rows for loss in row["losses"]]
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0

    def x(loss: float) -> float:
        return LEFT + (loss - low) / span * (WIDTH - LEFT - RIGHT)

    height = TOP + ROW * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18">held-out nats per byte (dots: three seeds, disc: mean)</text>',
    ]
    for step in range(5):
        loss = low + span * step / 4
        bottom = TOP + ROW * len(rows)
        parts.append(f'<path d="M{x(loss):.1f} {TOP - 6}V{bottom}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{x(loss):.1f}" y="{bottom + 16}" text-anchor="middle">{loss:.3f}</text>'
        )
    for index, row in enumerate(rows):
        y = TOP + ROW * index + ROW / 2
        name = escape(row["router"])
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.0f}" text-anchor="end">{name}</text>')
        ends = x(min(row["losses"])), x(max(row["losses"]))
        parts.append(f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="#4477aa"/>')
        for loss in row["losses"]:
            parts.append(f'<circle cx="{x(loss):.1f}" cy="{y}" r="2.5" fill="#4477aa"/>')
        parts.append(f'<circle cx="{x(row["mean"]):.1f}" cy="{y}" r="5" fill="#cc3311"/>')
    return "\n".join([*parts, "</svg>", ""])
