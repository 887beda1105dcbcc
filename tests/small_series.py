"""Small series in CSV files, for tests of forecasters."""

import math
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

TIME_MOE: dict[str, Any] = {
    "kind": "time_moe",
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 24,
    "max_positions": 64,
    "horizons": [1, 4],
    "moe": {
        "num_experts": 4,
        "d_expert": 12,
        "d_shared": 24,
        "shared_gate": True,
        "router": {
            "kind": "topk",
            "k": 2,
            "renormalize": False,
            "balance_loss": 0.04,
            "balance_over": "model",
        },
    },
}
MOIRAI: dict[str, Any] = {
    "kind": "moirai",
    "patch": 4,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 24,
    "max_positions": 64,
    "num_samples": 8,
    "moe": {"num_experts": 4, "d_expert": 12, "router": {"kind": "kmeans", "k": 2}},
}
TRAIN: dict[str, Any] = {"steps": 6, "sequence_length": 20, "batch_sequences": 8, "log_every": 1}


def write(
    path: Path, lines: int = 120, missing: Collection[tuple[int, str]] = (), first: str = "date"
) -> Path:
    """Write two waves with noise; ``missing`` are cells (line from 0, column) without a number."""
    draw = random.Random(3)
    rows = [f"{first},level,flow"]
    for line in range(lines):
        cells = {
            "level": 5 + 2 * math.sin(line / 3) + draw.gauss(0, 0.1),
            "flow": 40 + 9 * math.cos(line / 4) + draw.gauss(0, 0.5),
        }
        shown = ["" if (line, name) in missing else f"{x:.4f}" for name, x in cells.items()]
        rows.append(",".join([f"2024-01-{1 + line // 24:02} {line % 24:02}:00", *shown]))
    path.write_text("\n".join(rows) + "\n")
    return path


def values(source: Path, run_dir: Path, model: dict[str, Any] = TIME_MOE) -> dict[str, Any]:
    """Return the configuration of a small run."""
    return {
        "run_dir": str(run_dir),
        "seed": 3,
        "model": model,
        "data": {"format": "series", "source": str(source), "horizon": 6, "max_gap": 3},
        "train": TRAIN,
        "optimizer": {"lr": 5e-3, "warmup_steps": 0},
        "checkpoint": {"every": 3},
    }
