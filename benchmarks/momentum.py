"""Are momentum and Adam from MoE layer to MoE layer better than the plain residual (MomentumSMoE)?

    python benchmarks/momentum.py --text FILE [--work DIR] [--steps 350] [--lr 0.004] [--jobs 1]

A small byte-level model with six MoE layers, the same weights at the start and the same batches in
every arm, three seeds, paired. No arm has more parameters than another. ``gain`` is a control: the
plain residual with the experts' output doubled, which is about what momentum makes of it. Interrupt
and start again as you like; another learning rate needs another folder.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "shakespeare.yaml"
SIZES = [
    *("model.num_layers=6", "model.d_model=64", "model.moe.num_experts=8", "model.moe.d_expert=64"),
    *("train.sequence_length=128", "train.batch_sequences=8", "train.eval_sequences=400"),
    *("train.eval_every=0", "optimizer.warmup_steps=40"),
]
SEEDS = (0, 1, 2)
ARMS = {
    "plain": "{kind: residual}",
    "gain": "{kind: momentum, mu: 0, gamma: 2}",
    "momentum": "{kind: momentum, mu: 0.7, gamma: 1}",
    "robust": "{kind: robust}",
    "adam": "{kind: adam}",
}


def run_one(arm: str, seed: int, arguments: argparse.Namespace) -> float:
    """Train one model, or continue an earlier run, and return its held-out loss."""
    run_dir = arguments.work / f"{arm}-seed{seed}"
    overrides = [*SIZES, f"data.source={arguments.text}", f"seed={seed}", "checkpoint.every=100"]
    overrides += [f"optimizer.lr={arguments.lr}", f"model.moe.block={ARMS[arm]}"]
    records = train(CONFIG, run_dir, overrides, arguments.steps, threads=1)
    loss = float(records[-1]["eval_loss_per_byte"])
    print(f"{run_dir.name}: {loss:.4f} nats per byte", flush=True)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a text; its last tenth is scored")
    parser.add_argument("--work", type=Path, default=Path("runs/momentum"))
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    grid = [(arm, seed) for seed in SEEDS for arm in ARMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda cell: run_one(*cell, arguments), grid))
    losses = dict(zip(grid, found, strict=True))

    print(f"\nnats per held-out byte after {arguments.steps} steps on {arguments.text.name}")
    header = "".join(f"  seed {seed}" for seed in SEEDS)
    print(f"{'':10}{header}    mean   minus plain (mean +- stdev of pairs)")
    rows = {}
    for arm in ARMS:
        own = [losses[arm, seed] for seed in SEEDS]
        gaps = [losses[arm, seed] - losses["plain", seed] for seed in SEEDS]
        mean, gap, spread = statistics.mean(own), statistics.mean(gaps), statistics.stdev(gaps)
        rows[arm] = {"losses": own, "minus_plain_mean": gap, "minus_plain_stdev": spread}
        shown = "".join(f"  {loss:.4f}" for loss in own)
        print(f"{arm:10}{shown}  {mean:.4f}   {gap:+.4f} +- {spread:.4f}")
    path = write_results(
        "momentum",
        {
            "question": "held-out loss with blocks that carry a state, against the plain residual",
            "text": arguments.text.name,
            "steps": arguments.steps,
            "lr": arguments.lr,
            "blocks": ARMS,
            "arms": rows,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
