"""How much of a dense model's work can be left out, with and without sparse activations?

    python benchmarks/dynamic_experts.py TEXT [--work DIR] [--seeds 3] [--jobs 1]

Byte level; the dense MLPs have four times the model's width. Each seed trains a dense model on the
first nine tenths of TEXT. `moeyard sparsify` then fine-tunes it for as many steps in two ways:
`plain` is the same training, SiLU and no sparsity loss, and `sparse` has ReLU and the sparsity
loss. Both cut the MLPs into 32 experts and measure all thresholds on the last tenth of TEXT. Losses
are compared with the dense model of `plain`, the same training without a cut, and with those of the
cut model itself with all experts on. Interrupt and start again as you like.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "shakespeare.yaml"
DENSE = (
    "model.moe=null",
    "model.num_kv_heads=2",
    "data.eval_fraction=0.02",
    "train.eval_sequences=32",
    "optimizer.lr=3e-3",
    "optimizer.warmup_steps=40",
)
CUT = ("--experts=32", "--lr=1e-3", "--router-lr=5e-3")
ARMS = {
    "plain": ("--sparsity=0",),
    "sparse": ("--activation=reglu", "--sparsity=1"),
}
OPTIONS = (
    *("seeds", "width", "layers", "steps", "tune_steps", "router_steps"),
    *("batch", "length", "eval_windows"),
)
WITHIN = (0.01, 0.02, 0.05)
"""Relative rises of the loss at which the fewest operations are told."""


def moeyard(command: list[str], log: Path) -> None:
    """Run a command as a user would, on one thread."""
    with log.open("a") as out:
        subprocess.run(
            [sys.executable, "-m", "moeyard.cli", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
            check=True,
        )


def dense_model(seed: int, arguments: argparse.Namespace) -> Path:
    """Train the dense model of a seed, or continue, and return its folder."""
    work = arguments.work
    run_dir, folder = work / f"dense-seed{seed}", work / f"dense-seed{seed}-model"
    overrides = [f"data.source={work / 'train.txt'}", f"seed={seed}", *DENSE]
    overrides += [f"model.d_model={arguments.width}", f"model.d_ff={4 * arguments.width}"]
    overrides += [f"model.num_layers={arguments.layers}"]
    overrides += [f"train.sequence_length={arguments.length}"]
    overrides += [f"train.batch_sequences={arguments.batch}"]
    train(CONFIG, run_dir, overrides, arguments.steps, threads=1)
    if not folder.exists():
        moeyard(["export", str(run_dir), str(folder)], run_dir / "log.txt")
    return folder


def cut_model(arm: str, seed: int, source: Path, text: Path, options: list[str]) -> dict:
    """Cut a dense model, or continue, and return the table of thresholds."""
    target = source.parent / f"{arm}-seed{seed}"
    if not target.exists():
        command = ["sparsify", str(source), str(target), f"--data={text}", f"--seed={seed}"]
        moeyard([*command, *CUT, *ARMS[arm], *options], target.with_suffix(".log"))
    return json.loads((target / "sparsify.json").read_text())


def run_seed(seed: int, arguments: argparse.Namespace) -> dict[str, dict]:
    """Return the tables of both arms."""
    dense = dense_model(seed, arguments)
    options = [f"--batch={arguments.batch}", f"--eval-windows={arguments.eval_windows}"]
    options += [f"--length={arguments.length}", f"--router-width={arguments.width // 4}"]
    options += [f"--steps={arguments.tune_steps}", f"--router-steps={arguments.router_steps}"]
    tables = {arm: cut_model(arm, seed, dense, arguments.text, options) for arm in ARMS}
    for arm, table in tables.items():
        print(f"{arm} seed {seed}: {table['rows'][0]['loss']:.4f} nats per byte", flush=True)
    return tables


def cheapest(rows: list[dict], most: float, kind: str) -> float:
    """Return the fewest operations of a threshold with a loss of at most ``most``; 1 = the dense
    model's, which needs no cut."""
    return min([1.0, *(row[kind] for row in rows if row["loss"] <= most)])


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def show_curves(found: list[dict[str, dict]]) -> dict[str, list[dict]]:
    """Print and return loss against operations for each arm and threshold."""
    curves = {}
    for arm in ARMS:
        print(f"\n{arm}: loss over that of the plain dense model, mean +- stdev of {len(found)}")
        print("   tau  loss ratio         experts of 32   MLP operations  all operations")
        curves[arm] = []
        for index, first in enumerate(found[0][arm]["rows"]):
            row = {"tau": first["tau"]}
            for kind in ("ratio", "experts", "mlp_flops", "flops"):
                values = []
                for tables in found:
                    own, dense = tables[arm]["rows"][index], tables["plain"]["rows"][0]["loss"]
                    values.append(own["loss"] / dense if kind == "ratio" else own[kind])
                row[kind] = mean_and_spread(values)
            curves[arm].append(row)
            print(
                f"{row['tau']:6.3f}  {row['ratio'][0]:.4f} +- {row['ratio'][1]:.4f}  "
                f"{row['experts'][0]:6.2f} +- {row['experts'][1]:4.2f}  "
                f"{row['mlp_flops'][0]:8.3f} +- {row['mlp_flops'][1]:.3f}  "
                f"{row['flops'][0]:8.3f} +- {row['flops'][1]:.3f}"
            )
    return curves


def show_cheapest(found: list[dict[str, dict]]) -> list[dict]:
    """Print and return the operations left at each tolerated loss, over two dense models."""
    print("\noperations left within a rise of the loss, mean +- stdev")
    print("arm     rise over            MLP              all")
    rows = []
    for arm in ARMS:
        for over in ("plain dense", "own dense"):
            for rise in WITHIN:
                row = {"arm": arm, "over": over, "rise": rise}
                for kind in ("mlp_flops", "flops"):
                    values = []
                    for tables in found:
                        dense = tables["plain" if over == "plain dense" else arm]["rows"][0]["loss"]
                        values.append(cheapest(tables[arm]["rows"], (1 + rise) * dense, kind))
                    row[kind] = mean_and_spread(values)
                rows.append(row)
                left = (f"{m:.3f} +- {s:.3f}" for m, s in (row["mlp_flops"], row["flops"]))
                print(f"{arm:7} {rise:4.0%} {over:12}   {'   '.join(left)}")
    return rows


def tokens_per_s(folder: Path, rows: int, length: int) -> float:
    """Return the best rate of three tries of a forward over ``rows`` windows of bytes."""
    import torch

    import moeyard

    torch.set_num_threads(1)
    model = moeyard.load(folder)
    ids_BT = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))
    model(ids_BT)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        model(ids_BT)
        best = max(best, ids_BT.numel() / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/dynamic-experts"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000, help="of the dense model")
    parser.add_argument("--tune-steps", type=int, default=500, help="of the fine-tuning")
    parser.add_argument("--router-steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16, help="windows of a step")
    parser.add_argument("--length", type=int, default=128, help="bytes of a window")
    parser.add_argument("--eval-windows", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side, one thread each")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    text = arguments.text.read_bytes()
    (arguments.work / "train.txt").write_bytes(text[: len(text) * 9 // 10])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda seed: run_seed(seed, arguments), range(arguments.seeds)))

    curves, left = show_curves(found), show_cheapest(found)
    folders = {"dense": "dense-seed0-model", "plain": "plain-seed0", "sparse": "sparse-seed0"}
    length = arguments.length
    rates = {arm: tokens_per_s(arguments.work / name, 16, length) for arm, name in folders.items()}
    shown = "  ".join(f"{arm} {rate:,.0f}" for arm, rate in rates.items())
    print(f"\ntokens/s of a forward over 16 windows, one thread, chosen thresholds: {shown}")
    path = write_results(
        "dynamic_experts",
        {
            "question": "held-out loss against operations of dense models cut into experts",
            "options": {name: getattr(arguments, name) for name in OPTIONS},
            "arms": ARMS,
            "curves": curves,
            "operations_left": left,
            "tokens_per_s": rates,
            "router_errors": {arm: [t[arm]["router_error"] for t in found] for arm in ARMS},
        },
    )
    print(f"written to results/{path.name}")


if __name__ == "__main__":
    main()
