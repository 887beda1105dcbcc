"""The heat map of expert load: layers by experts, at any moment of the run.

L MoE layers, E experts. A cell is the expert's load over the layer's mean load, on a logarithmic
scale from 1/cap to cap, in one byte: 0 for an idle expert, else 1 to 255.
"""

import base64
import json
import math
from collections.abc import Sequence

CAPS = (1.5, 2.0, 4.0, 8.0)
COVERED = 0.9
"""Share of the cells with rows that must lie within the chosen cap."""


def heat_map(frames: Sequence[tuple[int, list[list[int]]]], layers: Sequence[int]) -> str:
    """Return the figure; ``frames`` are (step, routed rows [L][E])."""
    ratios = [[[_ratio(n, row) for n in row] for row in counts] for _, counts in frames]
    settled = ratios[len(ratios) // 2 :]  # the first steps are skewed in every run
    cap = choose_cap([r for frame in settled for row in frame for r in row])
    cells = bytes(encode(r, cap) for frame in ratios for row in frame for r in row)
    num_experts = len(frames[0][1][0])
    facts = {
        "steps": [step for step, _ in frames],
        "layers": list(layers),
        "experts": num_experts,
        "cap": cap,
        "cells": base64.b64encode(cells).decode(),
    }
    height = min(440, max(110, 30 * len(layers)))
    last = len(frames) - 1
    return f"""<figure id="heat"><h3>Load of every expert</h3>
<p class="note">One batch: rows routed to an expert, over the mean of its layer. 1x is perfect
balance.</p>
<div class="scale"><span>&le; {1 / cap:.3g}x</span><i class="ramp"></i><span>&ge; {cap:.3g}x</span>
<span>middle: 1x</span><span><i class="key idle"></i>idle</span></div>
<div class="heat"><div class="rows" style="height:{height}px">{_labels(layers, "top")}</div>
<canvas style="height:{height}px" aria-label="Heat map of expert load"></canvas>
<div></div><div class="columns">{_labels(range(num_experts), "left")}</div>
<div></div><div class="unit">expert (columns), layer (rows)</div></div>
<div class="play"><button type="button">Play</button>
<input type="range" min="0" max="{last}" value="{last}" aria-label="moment of the run">
<output>step {frames[last][0]}</output></div>
<noscript><p class="note">The heat map needs JavaScript; the table has its end.</p></noscript>
<script type="application/json">{json.dumps(facts)}</script></figure>"""


def choose_cap(ratios: Sequence[float]) -> float:
    """Return the smallest end of the scale that covers nearly all cells with rows."""
    sizes = sorted(max(r, 1 / r) for r in ratios if r > 0)
    if not sizes:
        return CAPS[0]
    needed = sizes[min(len(sizes) - 1, math.ceil(COVERED * len(sizes)) - 1)]
    return next((cap for cap in CAPS if cap >= needed), CAPS[-1])


def encode(ratio: float, cap: float) -> int:
    """Return a cell's byte."""
    if ratio == 0:
        return 0
    share = math.log(ratio) / math.log(cap)
    return 1 + round((min(1.0, max(-1.0, share)) + 1) / 2 * 254)


def _ratio(rows: int, layer: list[int]) -> float:
    total = sum(layer)
    return rows * len(layer) / total if total else 0.0


def _labels(names: Sequence[int], side: str) -> str:
    """Return up to 16 labels, each in the middle of its row or column."""
    stride = -(-len(names) // 16)
    return "".join(
        f'<span style="{side}:{(index + 0.5) / len(names) * 100:.2f}%">{names[index]}</span>'
        for index in range(0, len(names), stride)
    )
