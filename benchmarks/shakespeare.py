"""Does sparsity pay? MoE against a dense model of equal active size on tiny Shakespeare.

    python benchmarks/shakespeare.py TEXT [--work DIR] [--jobs 2]

Byte level, D=128, 4 layers, 1500 steps of 2048 tokens. The MoE has E=16 K=2 F=256, the dense model
a SwiGLU of 512: the same multiplications per token. Each gets the best of three learning rates,
chosen by its mean over three seeds; seeds are paired (same initial attention, same batches).
Interrupt and start again as you like: finished runs are kept, half-finished ones resume.
"""

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "shakespeare.yaml"
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
STEPS = 1500
ARMS = {"moe": [], "dense": ["model.moe=null", "model.d_ff=512"]}


def run_one(arm: str, lr: float, seed: int, text: Path, work: Path, threads: int) -> float:
    """Train one model, or continue an earlier run, and return its held-out loss."""
    run_dir = work / f"{arm}-lr{lr:g}-seed{seed}"
    overrides = [f"data.source={text}", f"optimizer.lr={lr}", f"seed={seed}", *ARMS[arm]]
    loss: float = train(CONFIG, run_dir, overrides, STEPS, threads)[-1]["eval_loss"]
    print(f"{run_dir.name}: {loss:.4f} nats per byte", flush=True)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/shakespeare"))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, cores / jobs each")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    grid = [(arm, lr, seed) for seed in SEEDS for lr in LEARNING_RATES for arm in ARMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        losses = dict(
            zip(
                grid,
                pool.map(lambda g: run_one(*g, arguments.text, arguments.work, threads), grid),
                strict=True,
            )
        )

    mean = {
        (arm, lr): statistics.mean(losses[arm, lr, seed] for seed in SEEDS)
        for arm in ARMS
        for lr in LEARNING_RATES
    }
    best = {arm: min(LEARNING_RATES, key=lambda lr: mean[arm, lr]) for arm in ARMS}
    gains = [losses["dense", best["dense"], s] - losses["moe", best["moe"], s] for s in SEEDS]
    print(f"\n{'':8}" + "".join(f"   lr {lr:<8g}" for lr in LEARNING_RATES) + "  (mean of 3 seeds)")
    for arm in ARMS:
        print(f"{arm:8}" + "".join(f"   {mean[arm, lr]:<11.4f}" for lr in LEARNING_RATES))
    print(f"\ndense minus moe at their best rates, per seed: {[f'{g:.4f}' for g in gains]}")
    print(f"mean {statistics.mean(gains):.4f}, standard deviation {statistics.stdev(gains):.4f}")
    path = write_results(
        "shakespeare",
        {
            "question": "validation loss in nats per byte, MoE against dense of equal active size",
            "losses": {f"{arm} lr={lr:g} seed={s}": v for (arm, lr, s), v in losses.items()},
            "mean_over_seeds": {f"{arm} lr={lr:g}": v for (arm, lr), v in mean.items()},
            "best_lr": best,
            "dense_minus_moe_per_seed": gains,
            "dense_minus_moe_mean": statistics.mean(gains),
            "dense_minus_moe_stdev": statistics.stdev(gains),
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
