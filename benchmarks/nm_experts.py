"""What do 2:4 experts cost in loss, trained by SR-STE or pruned at the end? What do they save?

    python benchmarks/nm_experts.py loss [--text FILE] [--work DIR] [--steps 300] [--jobs 2]
    python benchmarks/nm_experts.py speed MODEL_DIR TEXT

Loss: dense experts, 2:4 experts by SR-STE, by the same without decay (STE), and the dense ones
pruned by magnitude after training; equal steps, batches and first weights. The decay is chosen by
a search on a seed that the comparison does not use. Interrupt and start again as you like.

Speed: MODEL_DIR's experts are pruned to 2:4 and written in bf16 and packed; both run with a quarter
of the experts in memory, in turn, one sequence at a time. Answers must be equal bit for bit.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "demo.yaml"
SIZES = [
    *("model.num_layers=2", "train.sequence_length=128", "train.batch_sequences=8"),
    *("parallel.ep=1", "checkpoint.every=200", "train.eval_sequences=256"),
]
SEARCH_SEED, SEEDS = 0, (1, 2, 3)
DECAYS = (2e-4, 2e-3, 2e-2)
AIM_NATS, AIM_BYTES = 0.02, 0.57


def run_one(name: str, seed: int, decay: float | None, arguments: argparse.Namespace) -> list[dict]:
    """Train one model, or continue an earlier run, and return its records."""
    run_dir = arguments.work / f"{name}-seed{seed}"
    overrides = [*SIZES, f"seed={seed}"]
    if arguments.text is not None:
        overrides.append(f"data.source={arguments.text}")
    if decay is not None:
        overrides.append(f"train.sparse_experts={{n: 2, m: 4, decay: {decay}}}")
    records = train(CONFIG, run_dir, overrides, arguments.steps, threads=1)
    print(f"{run_dir.name}: {records[-1]['eval_loss']:.4f} nats", flush=True)
    return records


def pruned_loss(run_dir: Path) -> float:
    """Return the held-out loss of a finished run with its experts pruned to 2:4 by magnitude."""
    import torch

    from moeyard.kernels.values.n_of_m import NOfM, keep_mask, masked
    from moeyard.parallel.mesh import Mesh
    from moeyard.training.read_config import read_run_config
    from moeyard.training.trainer import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(read_run_config(run_dir / "config.yaml", []), run_dir, Mesh())
    trainer.saves.resume()
    for _, layer in trainer.decoder.moe_layers():
        for weight in (layer.experts.fc1.data, layer.experts.fc2.data):
            weight.copy_(masked(weight, keep_mask(weight, NOfM(2, 4))))
    return trainer.objective.evaluate(trainer._loss, Mesh()).metrics["eval_loss"]


def compare_losses(arguments: argparse.Namespace) -> None:
    """Search the decay, train all arms, and write what they lose."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        search = dict(
            zip(
                DECAYS,
                pool.map(lambda d: run_one(f"decay{d:g}", SEARCH_SEED, d, arguments), DECAYS),
                strict=True,
            )
        )
        best = min(DECAYS, key=lambda d: search[d][-1]["eval_loss"])
        arms = {"dense": None, "sr-ste": best, "ste": 0.0}
        grid = [(arm, seed) for seed in SEEDS for arm in arms]
        found = pool.map(lambda g: run_one(*g, arms[g[0]], arguments), grid)
        records = dict(zip(grid, found, strict=True))
    losses = {cell: runs[-1]["eval_loss"] for cell, runs in records.items()}
    losses |= {("one-shot", s): pruned_loss(arguments.work / f"dense-seed{s}") for s in SEEDS}
    print(f"\nsearch on seed {SEARCH_SEED}: {[(d, search[d][-1]['eval_loss']) for d in DECAYS]}")
    print(f"nats per held-out token after {arguments.steps} steps, decay {best:g}")
    print(f"{'':10}" + "".join(f"  seed {s}" for s in SEEDS) + "    mean   minus dense (stdev)")
    rows = {}
    for arm in ("dense", "sr-ste", "ste", "one-shot"):
        own = [losses[arm, seed] for seed in SEEDS]
        gaps = [losses[arm, seed] - losses["dense", seed] for seed in SEEDS]
        mean, spread = statistics.mean(gaps), statistics.stdev(gaps)
        rows[arm] = {"losses": own, "minus_dense_mean": mean, "minus_dense_stdev": spread}
        shown = "".join(f"  {loss:.4f}" for loss in own)
        print(f"{arm:10}{shown}  {statistics.mean(own):.4f}   {mean:+.4f} +- {spread:.4f}")
    for arm in ("sr-ste", "ste"):
        flips = [share_of_flips(records[arm, seed]) for seed in SEEDS]
        rows[arm]["mask_flips"] = flips
        print(f"weights that joined or left forward in a step, {arm}: " + shown_flips(flips[0]))
    holds = rows["sr-ste"]["minus_dense_mean"] <= AIM_NATS
    print(f"within {AIM_NATS} nats of dense: {'yes' if holds else 'no'}")
    facts = {"steps": arguments.steps, "decay": best, "arms": rows, "holds": holds}
    facts["search"] = {f"{d:g}": search[d][-1]["eval_loss"] for d in DECAYS}
    print(f"written to {write_results('nm_experts_loss', facts)}")


def share_of_flips(records: list[dict]) -> list[tuple[int, int]]:
    """Return the steps that were logged, and the mask flips of each."""
    return [(record["step"], record["mask_flips"]) for record in records]


def shown_flips(flips: list[tuple[int, int]]) -> str:
    """Return a few of them for people."""
    shown = flips[:: max(1, len(flips) // 6)]
    return ", ".join(f"step {step}: {count}" for step, count in shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    loss = parts.add_parser("loss")
    loss.add_argument("--text", type=Path, help="default: the running Python's standard library")
    loss.add_argument("--work", type=Path, default=Path("runs/nm-experts"))
    loss.add_argument("--steps", type=int, default=300)
    loss.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    compare_losses(arguments)


if __name__ == "__main__":
    main()
