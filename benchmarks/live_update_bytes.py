"""How many bytes an update of a run has, by what trains and by the steps between updates.

    python benchmarks/live_update_bytes.py TEXT

Trains a small model in bf16 for 21 steps and publishes full snapshots. Their hashes say which
units an update would have that comes every 1, 5 or 10 steps. Prints the share of a snapshot's bytes
and of its experts, and the share of single values of experts that differ.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from torch import Tensor

from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.updates.folder import UpdatesFolder
from moeyard.moe.updates.read import OpenUpdate
from moeyard.training.__main__ import main as train

from report import write_results

STEPS = 21
WIDTH, D_MODEL = 64, 64
MODEL = {
    "d_model": D_MODEL,
    "num_layers": 4,
    "num_heads": 4,
    "max_positions": 256,
    "moe": {
        "num_experts": 16,
        "d_expert": WIDTH,
        "router": {"kind": "topk", "k": 2, "balance_loss": 0.01},
    },
}
LR = {"lr": 1e-3, "warmup_steps": 5}
WAYS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": LR},
    "AdamW, no weight decay": {"optimizer": LR | {"weight_decay": 0.0}},
    "AdamW, a tenth of the rate": {"optimizer": LR | {"lr": 1e-4}},
    "Muon": {"optimizer": {"kind": "muon", "warmup_steps": 5}},
    "routers alone": {"optimizer": LR, "train": {"parameters": "router"}},
}


def publish(way: str, text: Path, space: Path) -> UpdatesFolder:
    """Train, and publish every step."""
    train_section = {
        "steps": STEPS,
        "sequence_length": 64,
        "batch_sequences": 4,
        "precision": "bf16",
        "log_every": STEPS,
        "eval_sequences": 4,
    }
    more = WAYS[way]
    values = {
        "run_dir": str(space / "run"),
        "model": MODEL,
        "data": {"source": str(text), "tokenizer": "bytes"},
        "checkpoint": {"every": STEPS},
        "publish": {"folder": str(space / "updates"), "every": 1, "full_every": 1, "keep": STEPS},
    }
    values |= more | {"train": train_section | more.get("train", {})}
    (space / "config.yaml").write_text(yaml.safe_dump(values))
    assert train([str(space / "config.yaml")]) == 0
    return UpdatesFolder(space / "updates")


def compare(way: str, every: int, updates: UpdatesFolder) -> dict[str, Any]:
    """Return what updates every so many steps would have, from the fifth step on."""
    pairs = [(v, v + every) for v in range(5, STEPS + 1 - every, every)]
    rows = [_changed(updates, *pair) for pair in pairs]
    names = ("share_of_bytes", "share_of_experts", "share_of_values")
    means = {name: mean(row[index] for row in rows) for index, name in enumerate(names)}
    return {"way": way, "every": every, "pairs": len(pairs)} | means


def _changed(updates: UpdatesFolder, first: int, second: int) -> tuple[float, float, float]:
    """Return shares of bytes, experts and values of experts that differ between two versions."""
    old, new = updates.manifest(first), updates.manifest(second)
    keys = {key for key, unit in new.units.items() if unit.digest != old.units[key].digest}
    num_bytes = sum(new.units[key].num_bytes for key in keys)
    experts = [key for key in new.units if not isinstance(key, str)]
    before, after = (
        OpenUpdate(updates.of(m.version), m, FAMILIES["qwen3_moe"]) for m in (old, new)
    )
    shares = [
        float((a != b).float().mean())
        for key in experts[::9]
        for a, b in zip(_parts(before, key), _parts(after, key), strict=True)
    ]
    before.close()
    after.close()
    changed = sum(key in keys for key in experts) / len(experts)
    return num_bytes / new.num_bytes, changed, mean(shares)


def _parts(update: OpenUpdate, key: Any) -> list[Tensor]:
    shapes = {"gate": (WIDTH, D_MODEL), "up": (WIDTH, D_MODEL), "down": (D_MODEL, WIDTH)}
    views = {part: torch.empty(shape, dtype=torch.bfloat16) for part, shape in shapes.items()}
    update.read_expert(key, views)
    return list(views.values())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            updates = publish(way, given.text, Path(folder))
            rows += [compare(way, every, updates) for every in (1, 5, 10)]
    print(f"\n{'':28} {'every':>5} {'bytes':>7} {'experts':>8} {'values':>7}")
    for row in rows:
        shares = (row["share_of_bytes"], row["share_of_experts"], row["share_of_values"])
        print(f"{row['way']:28} {row['every']:5} " + " ".join(f"{share:7.1%}" for share in shares))
    write_results("live_update_bytes", {"rows": rows})


if __name__ == "__main__":
    main()
