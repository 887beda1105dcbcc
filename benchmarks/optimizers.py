"""What does each optimizer keep for a weight, and which loss does a small MoE reach with it?

    python benchmarks/optimizers.py TEXT [--work DIR] [--steps 300] [--rates 0.001 0.002 0.004]

Byte level, D=64, 2 layers, E=8 K=2 F=64, steps of 512 tokens, one thread. Each optimizer gets the
best of the learning rates, by its mean over three seeds. Seeds are paired: the same initial
weights and batches. Bytes are those of the tensors that the optimizer holds in memory next to the
weights after a step: in fp32 on one process, and in bf16, masters included, on two ranks with all
experts each, without and with optimizer.shard_experts.

So small a run can show that an optimizer works and how it compares early in training. It cannot
show which one is best for a large model or a long run. Interrupt and start again as you like.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from moeyard.parallel.mesh import Mesh, build_mesh
from moeyard.parallel.process import process_group
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

from report import write_results

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "shakespeare.yaml"
NUM_EXPERTS = 8
SMALL = [
    *("model.d_model=64", "model.num_layers=2", f"model.moe.num_experts={NUM_EXPERTS}"),
    *("model.moe.d_expert=64", "train.sequence_length=128", "train.batch_sequences=4"),
    *("train.eval_every=0", "train.eval_sequences=200", "optimizer.warmup_steps=30"),
]
ARMS = {
    "adamw": ["optimizer.kind=adamw"],
    "muon": ["optimizer.kind=muon"],
    "frugal": ["optimizer.kind=frugal", "optimizer.refresh_steps=50"],
}
SEEDS = (0, 1, 2)


def open_run(arguments: argparse.Namespace, name: str, arm: str, more: list[str], mesh: Mesh):
    """Return a trainer of a small model."""
    run_dir = arguments.work / name
    run_dir.mkdir(parents=True, exist_ok=True)
    options = [f"run_dir={run_dir}", f"data.source={arguments.text}", *SMALL, *ARMS[arm], *more]
    options += [f"train.steps={arguments.steps}", f"checkpoint.every={arguments.steps}"]
    return Trainer(read_run_config(CONFIG, options), run_dir, mesh)


def bytes_per_parameter(trainer: Trainer) -> float:
    """Return what the optimizer holds next to the weights, for each weight of this process."""
    parameters = list(trainer.decoder.parameters())
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    held = {}
    for parameter in parameters:
        for tensor in trainer._step.optimizer.state_of(parameter):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values()) / sum(parameter.numel() for parameter in parameters)


def train_one(arguments: argparse.Namespace, arm: str, lr: float, seed: int) -> dict:
    """Train one model and return its loss and bytes, or read what an earlier run found."""
    name = f"{arm}-lr{lr:g}-seed{seed}-{arguments.steps}"
    path = arguments.work / f"{name}.json"
    if not path.exists():
        started = time.perf_counter()
        more = [f"optimizer.lr={lr}", f"seed={seed}"]
        trainer = open_run(arguments, name, arm, more, Mesh())
        trainer.run()
        records = (arguments.work / name / "metrics.jsonl").read_text().splitlines()
        found = {
            "loss": json.loads(records[-1])["eval_loss"],
            "bytes": bytes_per_parameter(trainer),
            "seconds": time.perf_counter() - started,
        }
        path.write_text(json.dumps(found))
    found = json.loads(path.read_text())
    print(f"{name}: {found['loss']:.4f} nats per byte, {found['seconds']:.0f} s", flush=True)
    return found


def measure_rank(arguments: argparse.Namespace) -> None:
    """Run on one of two ranks: write each optimizer's bytes, the most of the ranks."""
    with process_group(60) as watch:
        mesh = build_mesh(1, NUM_EXPERTS, watch, 60)
        found: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for arm, figures in found.items():
            for shards in ("false", "true"):
                more = ["train.precision=bf16", f"optimizer.shard_experts={shards}"]
                trainer = open_run(arguments, "ranks", arm, more, mesh)
                trainer._step.run(0, stop_requested=False)
                here = torch.tensor([bytes_per_parameter(trainer)], dtype=torch.float64)
                figures.append(float(mesh.largest(here)))
        if mesh.rank == 0:
            (arguments.work / "ranks.json").write_text(json.dumps(found))


def measure_ranks(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Start two ranks and return each optimizer's bytes in bf16, without and with shared state."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(arguments.text), "--on-rank"]
    command += ["--work", str(arguments.work)]
    with (arguments.work / "ranks.txt").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    found: dict[str, list[float]] = json.loads((arguments.work / "ranks.json").read_text())
    return found


def row_of(losses: dict[float, list[float]], adamw: list[float]) -> dict:
    """Return the best rate, and the difference to AdamW's losses at its own best rate."""
    best = best_rate(losses)
    gaps = [own - other for own, other in zip(losses[best], adamw, strict=True)]
    return {
        "losses": {f"{lr:g}": found for lr, found in losses.items()},
        "best_lr": best,
        "minus_adamw_mean": statistics.mean(gaps),
        "minus_adamw_stdev": statistics.stdev(gaps),
    }


def best_rate(losses: dict[float, list[float]]) -> float:
    """Return the learning rate with the lowest mean loss."""
    return min(losses, key=lambda lr: statistics.mean(losses[lr]))


def show(rows: dict[str, dict], steps: int, rates: list[float]) -> None:
    """Print the table."""
    print(f"\nnats per held-out byte after {steps} steps, mean of {len(SEEDS)} seeds")
    print(f"{'':12}" + "".join(f"  lr {lr:<8g}" for lr in rates), end="")
    print("  minus adamw, at the best rates")
    for arm, row in rows.items():
        means = (statistics.mean(found) for found in row["losses"].values())
        print(f"{arm:12}" + "".join(f"  {mean:<11.4f}" for mean in means), end="")
        print(f"  {row['minus_adamw_mean']:+.4f} +- {row['minus_adamw_stdev']:.4f}")
    print("\nbytes for a weight, next to the weight")
    print(f"{'':12}  fp32    bf16 with masters   the same, experts shared out by 2 ranks")
    for arm, row in rows.items():
        print(f"{arm:12}  {row['fp32']:<6.2f}  {row['bf16']:<18.2f}  {row['bf16_shared']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-3, 2e-3, 4e-3))
    parser.add_argument("--on-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if arguments.on_rank:
        measure_rank(arguments)
        return
    found = {
        (arm, lr, seed): train_one(arguments, arm, lr, seed)
        for seed in SEEDS
        for lr in arguments.rates
        for arm in ARMS
    }
    losses = {
        arm: {lr: [found[arm, lr, seed]["loss"] for seed in SEEDS] for lr in arguments.rates}
        for arm in ARMS
    }
    adamw = losses["adamw"][best_rate(losses["adamw"])]
    rows = {arm: row_of(losses[arm], adamw) for arm in ARMS}
    for arm, (whole, shared) in measure_ranks(arguments).items():
        fp32 = found[arm, arguments.rates[0], SEEDS[0]]["bytes"]
        rows[arm] |= {"fp32": fp32, "bf16": whole, "bf16_shared": shared, "overrides": ARMS[arm]}
    show(rows, arguments.steps, arguments.rates)
    question = "bytes of state for a weight, and held-out loss, of each optimizer"
    figures = {"question": question, "steps": arguments.steps, "model": SMALL, "arms": rows}
    print(f"written to {write_results('optimizers', figures)}")


if __name__ == "__main__":
    main()
