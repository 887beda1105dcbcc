"""Are single units of MoE-X easier to read than those of other layers of the same active size?

    python benchmarks/interpretability.py --text FILE [--work DIR] [--steps 240] [--jobs 1]

The model of configs/train/moex.yaml and three seeds, paired: the same batches in every arm. A token
uses as many weights in each arm, but for the router's matrix. Then a text that training has not
seen is read: how often a unit is 0, how many units a token uses, and how well the best single unit
of a layer tells a feature of the text (serving/evaluation/unit_coverage.py). An MoE has more units
than a dense layer with as many active ones, and so more to choose the best from: the last column
gives every arm as many. Interrupt and start again as you like.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import moeyard
from moeyard.serving.evaluation.byte_features import byte_features
from moeyard.serving.evaluation.unit_coverage import Units, coverage, unit_values
from moeyard.training.checkpoints.export import export_newest

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "moex.yaml"
SEEDS = (0, 1, 2)
TOPK = "model.moe.router={kind: topk, k: 2, balance_loss: 0.01}"
DENSE = [
    "model.moe.num_experts=1",
    "model.moe.d_expert=256",
    "model.moe.router={kind: topk, k: 1, balance_loss: 0}",
]
ARMS = {
    "dense, gelu": [*DENSE, "model.moe.activation=gelu"],
    "dense, relu": [*DENSE, "model.moe.activation=relu"],
    "top-k, swiglu": [TOPK, "model.moe.activation=swiglu", "model.moe.d_expert=86"],
    "top-k, relu": [TOPK],
    "MoE-X": [],
}
"""Overrides of the configuration. Units that a token uses in a layer: 256, or 172 with a third
matrix."""
HELD_OUT_SHARE = 0.1
"""Of the text's bytes, at its end; training reads the rest."""
READ_BYTES = 16_384
"""Of the held-out text: the first half chooses units, the second half scores them."""
SUBSET = 172
"""Units of a layer in every arm in the last column: as many as the arm with the fewest has active
ones."""
DRAWS = 3
"""Random choices of that many units, whose mean is reported."""
MEASURES = ("loss", "zeros", "used", "coverage", "of as many units")


def run_one(arm: str, seed: int, work: Path, text: Path, steps: int) -> dict[str, float]:
    """Train and measure one model, or read an earlier result."""
    run_dir = work / f"{arm.replace(', ', '-')}-seed{seed}"
    cache = run_dir / f"units-{steps}.json"
    if not cache.exists():
        overrides = [f"seed={seed}", f"data.source={text}", *ARMS[arm]]
        overrides += [f"data.eval_fraction={HELD_OUT_SHARE}", f"checkpoint.every={steps}"]
        records = train(CONFIG, run_dir, overrides, steps, threads=1)
        loss = records[-1]["eval_loss_per_byte"]
        reports = measure(moeyard.load(export_newest(run_dir)), text)
        cache.write_text(json.dumps({"loss": loss, **reports}))
    found: dict[str, float] = json.loads(cache.read_text())
    print(run_dir.name, *(f"{name}={found[name]:.4f}" for name in MEASURES), flush=True)
    return found


def measure(model: moeyard.LanguageModel, text: Path) -> dict[str, float]:
    """Return the measures on the held-out text; those of units are means over layers."""
    data = text.read_bytes()
    data = data[len(data) - int(HELD_OUT_SHARE * len(data)) :][:READ_BYTES]
    features, layers = byte_features(data), unit_values(model, list(data))
    every = best_of([coverage(layer.values_NU, features) for layer in layers])
    few = [best_of([coverage(some(n, layer), features) for layer in layers]) for n in range(DRAWS)]
    return {
        "zeros": statistics.mean(layer.zero_share for layer in layers),
        "used": statistics.mean(layer.effective_units for layer in layers),
        "coverage": statistics.mean(every.values()),
        "of as many units": statistics.mean(f1 for draw in few for f1 in draw.values()),
        **{f"f1 {name}": f1 for name, f1 in every.items()},
    }


def best_of(layers: list[dict[str, float]]) -> dict[str, float]:
    """Return the best F1 of any layer by feature."""
    return {name: max(layer[name] for layer in layers) for name in layers[0]}


def some(draw: int, layer: Units) -> torch.Tensor:
    """Return the values of some units, another choice in each draw."""
    generator = torch.Generator().manual_seed(draw)
    chosen = torch.randperm(layer.values_NU.shape[1], generator=generator)[:SUBSET]
    return layer.values_NU[:, chosen]


def main() -> None:
    """Train, measure, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to learn and to read")
    parser.add_argument("--work", type=Path, default=Path("runs/interpretability"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    grid = [(arm, seed) for seed in SEEDS for arm in ARMS]
    given = (arguments.work, arguments.text.resolve(), arguments.steps)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(grid, pool.map(lambda cell: run_one(*cell, *given), grid), strict=True))
    print(f"\nafter {arguments.steps} steps, mean of {len(SEEDS)} seeds +- stdev;")
    print("used: units of a layer that a token uses; coverage: mean F1 of the best unit")
    print(f"{'':14}" + "".join(f"{name:>20}" for name in MEASURES))
    rows = {}
    for arm in ARMS:
        own = {name: [found[arm, seed][name] for seed in SEEDS] for name in found[arm, 0]}
        gaps = {
            name: [found[arm, s][name] - found["MoE-X", s][name] for s in SEEDS]
            for name in MEASURES
        }
        rows[arm] = {"values": own, "minus_moex": gaps}
        cells = (
            f"{statistics.mean(own[name]):12.4f} +- {statistics.stdev(own[name]):.4f}"
            for name in MEASURES
        )
        print(f"{arm:14}" + "".join(f"{cell:>20}" for cell in cells))
    for arm in ARMS:
        pairs = (
            f"{name} {statistics.mean(gap):+.4f} +- {statistics.stdev(gap):.4f}"
            for name, gap in rows[arm]["minus_moex"].items()
        )
        print(f"{arm} minus MoE-X (pairs): " + ", ".join(pairs))
    result = {"steps": arguments.steps, "text": arguments.text.name, "arms": rows}
    print(f"written to {write_results('interpretability', result)}")


if __name__ == "__main__":
    main()
