"""A trained model with its experts in 8 and 4 bits: size, and perplexity on held-out text.

    python benchmarks/few_bits.py --out FOLDER [--steps 600] [--threads 2]

Trains the shape of configs/train/demo.yaml on the standard library, exports it, converts the export
with ``moeyard convert`` and scores held-out windows with ``moeyard.load``. Runs and folders stay in
FOLDER, and a second start continues from there. Bytes are those of the weight files; perplexity is
per token (a byte).
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import moeyard
from moeyard.cli import main as command
from moeyard.parallel.mesh import Mesh
from moeyard.training.data.text import build_data
from moeyard.training.read_config import read_run_config

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs/train/demo.yaml"
KINDS = ("bf16", "int8", "int4")
WINDOWS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run_dir, exported = arguments.out / "run", arguments.out / "export"
    train(CONFIG, run_dir, ["parallel.ep=1"], arguments.steps, arguments.threads)
    if not exported.exists():
        assert command(["export", str(run_dir), str(exported)]) == 0
    windows = held_out_windows(run_dir)
    rows = {}
    for kind in KINDS:
        folder = arguments.out / kind
        if not folder.exists():
            assert command(["convert", str(exported), str(folder), "--dtype", kind]) == 0
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        loss = held_out_loss(folder, windows)
        rows[kind] = {"bytes": num_bytes, "nats": loss, "perplexity": math.exp(loss)}
    base = rows["bf16"]
    print(f"{windows[:, 1:].numel()} held-out tokens, {arguments.steps} steps")
    print(f"{'experts':8}{'MiB':>8}{'of bf16':>9}{'perplexity':>12}{'more':>9}")
    for kind, row in rows.items():
        row["size_ratio"] = row["bytes"] / base["bytes"]
        row["perplexity_ratio"] = row["perplexity"] / base["perplexity"]
        print(
            f"{kind:8}{row['bytes'] / 2**20:8.2f}{row['size_ratio']:9.2f}{row['perplexity']:12.4f}"
            f"{row['perplexity_ratio'] - 1:9.2%}"
        )
    write_results("few_bits", {"steps": arguments.steps, "rows": rows})


def held_out_windows(run_dir: Path) -> torch.Tensor:
    config = read_run_config(run_dir / "config.yaml")
    data = build_data(config, run_dir / "data", Mesh())
    parts, step = [], 0
    while sum(map(len, parts)) < WINDOWS:
        parts.append(data.held_out.sequences(step, range(config.train.batch_sequences)))
        step += 1
    return torch.cat(parts)[:WINDOWS]


def held_out_loss(folder: Path, windows: torch.Tensor) -> float:
    model = moeyard.load(folder, dtype="bfloat16")
    total = 0.0
    for some in windows.split(16):
        logits = model(some[:, :-1]).float().flatten(0, 1)
        total += float(F.cross_entropy(logits, some[:, 1:].flatten(), reduction="sum"))
    return total / windows[:, 1:].numel()


if __name__ == "__main__":
    main()
