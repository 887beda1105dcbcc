"""How much validation loss do early routers cost, and does a bias balance the load?

    python benchmarks/router_loss.py [--work DIR] [--steps 300] [--jobs 2]

The model, data and learning rate of configs/train/demo.yaml on one rank, three seeds, paired: the
same initial attention and the same batches in every arm. Interrupt and start again as you like.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "demo.yaml"
SEEDS = (0, 1, 2)
ARMS = {
    "topk": "{kind: topk, k: 2, balance_loss: 0.01, z_loss: 0.001}",
    "hash": "{kind: hash, k: 2}",
    "pregated": "{kind: topk, k: 2, lookahead: previous_block, balance_loss: 0.01, z_loss: 0.001}",
    "preattention": "{kind: topk, k: 2, lookahead: attention_input, score: sigmoid, "
    "balance_loss: 0.01, z_loss: 0.001}",
    "bias": "{kind: topk, k: 2, score: sigmoid, bias_update_rate: 0.003, balance_loss: 0}",
    "slow bias": "{kind: topk, k: 2, score: sigmoid, bias_update_rate: 0.001, balance_loss: 0}",
    "no balance": "{kind: topk, k: 2, score: sigmoid, balance_loss: 0}",
}


def run_one(arm: str, seed: int, steps: int, work: Path) -> list[dict]:
    """Train one model, or continue an earlier run, and return its metrics."""
    run_dir = work / f"{arm.replace(' ', '-')}-seed{seed}"
    overrides = [f"seed={seed}", f"model.moe.router={ARMS[arm]}", "parallel.ep=1"]
    records = train(CONFIG, run_dir, [*overrides, "checkpoint.every=200"], steps, threads=1)
    print(f"{run_dir.name}: {records[-1]['eval_loss_per_byte']:.4f} nats per byte", flush=True)
    return records


def worst_load(records: list[dict]) -> float:
    """Return the largest max/mean of any layer, over the rows of the last five logged steps."""
    layers = zip(*(record["expert_tokens"] for record in records[-5:]), strict=True)
    summed = [[sum(step) for step in zip(*layer, strict=True)] for layer in layers]
    return max(max(counts) * len(counts) / sum(counts) for counts in summed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/router-loss"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    grid = [(arm, seed) for seed in SEEDS for arm in ARMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda g: run_one(*g, arguments.steps, arguments.work), grid)
        records = dict(zip(grid, found, strict=True))

    losses = {cell: runs[-1]["eval_loss_per_byte"] for cell, runs in records.items()}
    loads = {cell: worst_load(runs) for cell, runs in records.items()}
    header = "".join(f"  seed {seed}" for seed in SEEDS)
    print(f"\nnats per held-out byte after {arguments.steps} steps")
    print(f"{'':13}{header}    mean   minus topk (mean +- stdev of pairs)   worst layer's max/mean")
    rows = {}
    for arm in ARMS:
        own = [losses[arm, seed] for seed in SEEDS]
        gaps = [losses[arm, seed] - losses["topk", seed] for seed in SEEDS]
        worst = [loads[arm, seed] for seed in SEEDS]
        rows[arm] = {
            "losses": own,
            "mean": statistics.mean(own),
            "minus_topk_mean": statistics.mean(gaps),
            "minus_topk_stdev": statistics.stdev(gaps),
            "worst_load": worst,
        }
        print(
            f"{arm:13}"
            + "".join(f"  {loss:.4f}" for loss in own)
            + f"  {rows[arm]['mean']:.4f}   {rows[arm]['minus_topk_mean']:+.4f} +- "
            f"{rows[arm]['minus_topk_stdev']:.4f}"
            + " " * 22
            + "  ".join(f"{load:.2f}" for load in worst)
        )
    path = write_results(
        "router_loss",
        {
            "question": "validation loss of early routers against top-k; load under a bias",
            "steps": arguments.steps,
            "routers": ARMS,
            "arms": rows,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
