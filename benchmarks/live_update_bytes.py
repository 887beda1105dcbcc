"""How many bytes an update of a run has, by what trains and by the steps between updates.

    python benchmarks/live_update_bytes.py TEXT

Trains a small model in bf16 for 41 steps, and publishes every 1, 5 or 20 of them: one full
snapshot, and then what has changed. Prints the share of bytes and of experts in an update, the
share of single values that differ between two versions of an expert, and the time of publishing.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from torch import Tensor

from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.updates.folder import UpdatesFolder
from moeyard.moe.updates.manifest import Manifest
from moeyard.moe.updates.read import OpenUpdate
from moeyard.training.__main__ import main as train
from moeyard.training.publisher import Publisher

from report import write_results

STEPS = 41
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


@dataclass(frozen=True)
class Published:
    """The versions of a run."""

    updates: UpdatesFolder
    manifests: list[Manifest]

    def values(self) -> float | None:
        """Return the share of values that differ between versions of an expert; None without."""
        shares = []
        for before, after in zip(self.manifests[1:], self.manifests[2:], strict=False):
            both = [key for key in after.units if not isinstance(key, str) and key in before.units]
            old, new = (
                OpenUpdate(self.updates.of(m.version), m, FAMILIES["qwen3_moe"])
                for m in (before, after)
            )
            for key in both[::9]:
                pairs = zip(_parts(old, key), _parts(new, key), strict=True)
                shares += [float((a != b).float().mean()) for a, b in pairs]
            old.close()
            new.close()
        return mean(shares) if shares else None


def publish(way: str, every: int, text: Path, space: Path) -> Published:
    """Train and publish."""
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
        "publish": {"folder": str(space / "updates"), "every": every, "full_every": 1000},
    }
    values |= more | {"train": train_section | more.get("train", {})}
    (space / "config.yaml").write_text(yaml.safe_dump(values))
    assert train([str(space / "config.yaml")]) == 0
    updates = UpdatesFolder(space / "updates")
    return Published(updates, [updates.manifest(version) for version in updates.versions()])


def measure(way: str, every: int, text: Path) -> dict[str, Any]:
    """Return what a run published, and how long that took."""
    seconds: list[float] = []
    plain = Publisher._publish

    def timed(self: Publisher, *arguments: Any) -> str | None:
        started = time.process_time()
        problem = plain(self, *arguments)
        seconds.append(time.process_time() - started)
        return problem

    Publisher._publish = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = publish(way, every, text, Path(folder))
            full, deltas = found.manifests[0], found.manifests[1:]
            return {
                "way": way,
                "every": every,
                "updates": len(deltas),
                "full_bytes": full.num_bytes,
                "share_of_bytes": mean(m.num_bytes / full.num_bytes for m in deltas),
                "share_of_experts": mean(_experts(m) / _experts(full) for m in deltas),
                "share_of_values": found.values(),
                "cpu_s": mean(seconds[1:]),
            }
    finally:
        Publisher._publish = plain  # type: ignore[method-assign]


def _experts(manifest: Manifest) -> int:
    return sum(not isinstance(key, str) for key in manifest.units)


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
    rows = [measure(way, every, given.text) for way in WAYS for every in (1, 5, 20)]
    print(f"\n{'':28} {'every':>5} {'bytes':>7} {'experts':>8} {'values':>7} {'CPU':>7}")
    for row in rows:
        values = "-" if row["share_of_values"] is None else f"{row['share_of_values']:.1%}"
        print(
            f"{row['way']:28} {row['every']:5} {row['share_of_bytes']:7.1%} "
            f"{row['share_of_experts']:8.1%} {values:>7} {1e3 * row['cpu_s']:4.0f} ms"
        )
    write_results("live_update_bytes", {"rows": rows})


if __name__ == "__main__":
    main()
