"""Small pairs of texts, for tests of encoder-decoders."""

import json
import random
from pathlib import Path
from typing import Any

ENCODER_DECODER: dict[str, Any] = {
    "kind": "encoder_decoder",
    "d_model": 16,
    "num_layers": 4,
    "num_heads": 2,
    "d_ff": 24,
    "max_positions": 48,
    "num_buckets": 8,
    "max_distance": 16,
    "dense_layers": [0, 2],
    "moe": {
        "num_experts": 4,
        "d_expert": 24,
        "activation": "relu",
        "router": {"kind": "topk", "k": 1, "renormalize": False},
    },
}
"""With the layout of Switch Transformer: experts in every other layer."""


def pairs(count: int = 60, seed: int = 0) -> list[dict[str, str]]:
    """Return texts with their letters in reverse order; no two are alike."""
    draw, found = random.Random(seed), []
    for number in range(count):
        word = "".join(draw.choice("abcdef") for _ in range(draw.randint(1, 9)))
        text = f"{word} {number}"
        found.append({"source": text, "target": text[::-1]})
    return found


def write(path: Path, lines: list[Any] | None = None) -> Path:
    """Write JSON lines."""
    lines = pairs() if lines is None else lines
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
