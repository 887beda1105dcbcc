"""Does a gate by clusters of a trained model forecast better than a learned one or a dense model?

    python benchmarks/cluster_gate.py --data ETTh1.csv [--work DIR] [--steps 300] [--jobs 1]

Moirai-MoE (Liu et al. 2024) clusters what a trained dense model computes, and sends each patch to
the experts of the nearest clusters. Its released code takes the farthest. Here a small dense Moirai
is trained on the first twelve months of a table of hourly series. It then goes on for as many steps
again: as it is, or with its MLPs copied into 8 experts of which 2 compute, behind a learned gate or
behind its clusters. A dense model whose MLPs are as wide as two experts has all of the steps from
the start. Errors are those of forecasts in the last four months of twenty. Interrupt and start
again as you like.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.models.series_model import SeriesModel
from moeyard.moe.models.table import build_model
from moeyard.training.checkpoints.export import export_newest
from moeyard.training.checkpoints.start_from import read_start

from report import write_results
from runs import train
from series_errors import CONTEXT, HORIZON, PARTS, measure, windows

MODEL = {
    "kind": "moirai",
    "patch": 16,
    "d_model": 64,
    "num_layers": 3,
    "num_heads": 4,
    "d_ff": 128,
    "max_positions": 1024,
    "num_samples": 50,
}
EXPERTS, CHOSEN = 8, 2
CLUSTERS = ["cluster", "--experts", str(EXPERTS), "--k", str(CHOSEN), "--choose"]
BEGINNINGS = {
    "dense": None,
    "topk": ["upcycle", "--num-experts", str(EXPERTS), "--k", str(CHOSEN)],
    "nearest": [*CLUSTERS, "nearest"],
    "farthest": [*CLUSTERS, "farthest"],
}
"""The command that makes the model that an arm goes on from; None = the dense one."""
WIDE = "dense-wide"
ARMS = (*BEGINNINGS, WIDE)
PAIRS = (
    ("nearest", "topk"),
    ("farthest", "topk"),
    ("nearest", "farthest"),
    ("topk", "dense"),
    ("nearest", "dense"),
    ("nearest", WIDE),
)


def moeyard(*arguments: str) -> None:
    """Run a command of moeyard."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moeyard.cli", *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True)


def beginning(arm: str, base: Path, work: Path) -> Path:
    """Return the folder that an arm of a seed starts from."""
    command = BEGINNINGS[arm]
    dense = export_newest(base)
    if command is None:
        return dense
    folder = work / f"{base.name}-{arm}"
    if not folder.exists():
        name, *options = command
        source = base if name == "cluster" else dense
        moeyard(name, str(source), str(folder), *options)
    return folder


def run_seed(seed: int, steps: int, work: Path, config: Path, data: Path) -> dict[str, dict]:
    """Train all arms of a seed, or continue earlier runs, and return what was measured."""
    base = work / f"base-seed{seed}"
    train(config, base, [f"seed={seed}"], steps, 1, "eval_loss")
    found = {}
    for arm in ARMS:
        run_dir = work / f"{arm}-seed{seed}"
        if arm == WIDE:
            own, length = [f"model.d_ff={CHOSEN * MODEL['d_ff']}"], 2 * steps
        else:
            own, length = [f"start_from={beginning(arm, base, work)}", "model=null"], steps
        records = train(config, run_dir, [f"seed={seed}", *own], length, 1, "eval_loss")
        found[arm] = measured(run_dir, data) | {"busiest": busiest(records[-1])}
        print(f"{run_dir.name}: {found[arm]}", flush=True)
    return found


def busiest(record: dict) -> float | None:
    """Return the busiest expert's load over the mean, of the layer where it is largest."""
    loads = [load["max_over_mean"] for load in record.get("load", [])]
    return max(loads, default=None)


def measured(run_dir: Path, data: Path) -> dict[str, float]:
    """Return the errors of a run's model on test windows, measured once."""
    path = run_dir / "measured.json"
    if not path.exists():
        path.write_text(json.dumps(measure(open_model(run_dir), windows(data))))
    return json.loads(path.read_text())


def open_model(run_dir: Path) -> SeriesModel:
    """Return the newest model of a run."""
    folder = export_newest(run_dir)
    model = build_model(ModelFolder(folder).config)
    read_start(str(folder), model)
    assert isinstance(model, SeriesModel)
    return model.eval()


def write_config(arguments: argparse.Namespace) -> Path:
    """Write the configuration that all runs share."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    values = {
        "run_dir": str(work / "run"),
        "model": MODEL,
        "data": {
            "format": "series",
            "source": str(arguments.data.resolve()),
            "split": list(PARTS),
            "context": CONTEXT,
            "horizon": HORIZON,
        },
        "train": {
            "steps": arguments.steps,
            "sequence_length": CONTEXT + HORIZON,
            "batch_sequences": 16,
            "log_every": 50,
            "eval_sequences": 64,
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 30},
        "checkpoint": {"every": 100, "keep": 1},
    }
    path = work / "moirai.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CSV of hourly series, as ETTh1")
    parser.add_argument("--work", type=Path, default=Path("runs/cluster-gate"))
    parser.add_argument("--steps", type=int, default=200, help="of each of the two trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side, one thread each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = write_config(arguments)
    seeds = range(arguments.seeds)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(
            pool.map(
                lambda seed: run_seed(
                    seed, arguments.steps, arguments.work, config, arguments.data
                ),
                seeds,
            )
        )
    rows = {
        arm: {name: [seed[arm][name] for seed in found] for name in found[0][arm]} for arm in ARMS
    }
    pairs = differences(found)
    show(rows, pairs, arguments.steps)
    path = write_results(
        "cluster_gate",
        {
            "question": "forecasts of gates by clusters, a learned gate and dense models",
            "data": arguments.data.name,
            "steps": arguments.steps,
            "model": MODEL,
            "experts": [EXPERTS, CHOSEN],
            "test_series": len(windows(arguments.data)),
            "arms": rows,
            "pairs": pairs,
        },
    )
    print(f"written to {path}")


def differences(found: list[dict[str, dict]]) -> dict[str, dict]:
    """Return the quantile loss of one arm less that of another, in pairs of a seed."""
    rows = {}
    for one, other in PAIRS:
        apart = [seed[one]["wql"] - seed[other]["wql"] for seed in found]
        stdev = statistics.stdev(apart) if len(apart) > 1 else None
        rows[f"{one} - {other}"] = {
            "each": apart,
            "mean": statistics.mean(apart),
            "stdev": stdev,
        }
    return rows


def show(rows: dict[str, dict], pairs: dict[str, dict], steps: int) -> None:
    """Print the tables."""
    print(f"\ntest windows after {steps} + {steps} steps")
    print("arm         quantile loss by seed     mean    MSE     MAE     nats    in 80 %")
    for arm, row in rows.items():
        each = " ".join(f"{value:.4f}" for value in row["wql"])
        means = "  ".join(
            f"{statistics.mean(row[name]):.4f}"
            for name in ("wql", "mse", "mae", "nll", "inside_80")
        )
        print(f"{arm:11} {each}  {means}")
    print("\nquantile loss, in pairs of a seed")
    for pair, row in pairs.items():
        each = " ".join(f"{value:+.4f}" for value in row["each"])
        spread = "" if row["stdev"] is None else f" +- {row['stdev']:.4f}"
        print(f"{pair:20} {each}  {row['mean']:+.4f}{spread}")


if __name__ == "__main__":
    main()
