"""Small labelled texts, for tests of encoders."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = {
    "sea": ["salt", "wave", "tide", "fish"],
    "town": ["road", "lamp", "shop", "tram"],
    "wood": ["leaf", "bark", "moss", "root"],
}
ENCODER: dict[str, Any] = {
    "kind": "encoder",
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 24,
    "max_positions": 48,
    "moe": {"num_experts": 4, "d_expert": 12, "router": {"kind": "topk", "k": 2}},
}


def records(count: int = 90, seed: int = 0) -> list[dict[str, str]]:
    """Return texts of the words of their labels; no two are alike."""
    draw, found = random.Random(seed), []
    for number in range(count):
        label = list(WORDS)[number % 3]
        words = [draw.choice(WORDS[label]) for _ in range(draw.randint(1, 9))]
        found.append({"text": " ".join([*words, str(number)]), "label": label})
    return found


def write(path: Path, lines: list[dict[str, Any]] | None = None) -> Path:
    """Write JSON lines."""
    lines = records() if lines is None else lines
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
