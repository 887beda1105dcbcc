"""A small click log with semantic ids, for tests of recommendation."""

from pathlib import Path
from typing import Any

import torch

from moeyard.moe.items.semantic_ids import fit_codebooks
from moeyard.moe.items.table import FILE, ItemTable

from click_log import World

WORLD = World(users=40, items=30, categories=4, sessions=5, seed=1)
MODEL: dict[str, Any] = {
    "kind": "encoder_decoder",
    "d_model": 16,
    "num_layers": 4,
    "source_layers": 2,
    "num_heads": 2,
    "d_ff": 24,
    "max_positions": 64,
    "dense_layers": [0],
    "moe": {
        "num_experts": 4,
        "d_expert": 12,
        "activation": "relu",
        "router": {"kind": "topk", "k": 2, "balance_loss": 0.01},
    },
}
TRAIN = {"steps": 4, "sequence_length": 30, "batch_sequences": 8, "log_every": 1}


def small_table(num_items: int = WORLD.items) -> ItemTable:
    """Return items of the world with three codes of four; some share an id."""
    x_ND = torch.from_numpy(WORLD.contents_ND[:num_items]).float()
    _, codes_NL = fit_codebooks(x_ND, 3, 4, seed=0)
    return ItemTable([f"i{item}" for item in range(num_items)], codes_NL, 4)


def write(folder: Path) -> dict[str, Any]:
    """Write the log and the items into a folder, and return a configuration of a run on them."""
    WORLD.write(folder)
    (folder / "items").mkdir()
    (folder / "items" / FILE).write_text(small_table().text())
    data = {
        "format": "sessions",
        "source": str(folder / "log.csv"),
        "items": str(folder / "items"),
        "session_items": 3,
        "min_history": 2,
        "recall_at": 5,
        "beams": 3,
    }
    return {
        "run_dir": str(folder / "unset"),
        "model": MODEL,
        "data": data,
        "train": TRAIN,
        "optimizer": {"lr": 5e-3, "warmup_steps": 0},
        "checkpoint": {"every": 2},
    }
