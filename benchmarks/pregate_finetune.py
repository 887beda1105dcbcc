"""How much loss does pre-gating a trained model cost, and how much does fine-tuning recover?

    python benchmarks/pregate_finetune.py [--source stdlib] [--work DIR] [--steps 800]
        [--fine-tune-steps 300] [--jobs 1]

A small Qwen3-MoE-like model is trained and exported. The routers of its copy are rewired to read
what the experts of the previous MoE layer read (configs/train/pregate.yaml). Both are trained on
for the same steps over the same batches: the original as the control, the pre-gated one with only
its routers and with all parameters. Interrupt and start again as you like.
"""

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import write_results
from runs import train

CONFIGS = Path(__file__).parent.parent / "configs" / "train"
SEEDS = (0, 1, 2)
SIZES = ["train.sequence_length=128", "train.batch_sequences=8", "train.eval_sequences=256"]
MODEL = [
    *("model.d_model=64", "model.num_layers=4", "model.num_heads=4", "model.num_kv_heads=2"),
    "model.moe={num_experts: 8, d_expert: 96, router: {kind: topk, k: 2, z_loss: 0.001}}",
]
STILL = ["optimizer.lr=1e-30", "optimizer.weight_decay=0"]
PLAIN = "model=null"  # all as in the folder
CONTROL = "original, all parameters"
ARMS = {
    "original, not trained on": [PLAIN, *STILL],
    CONTROL: [PLAIN],
    "pre-gated, not trained on": STILL,
    "pre-gated, routers alone": ["train.parameters=router"],
    "pre-gated, all parameters": [],
}


def run_seed(seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the held-out loss of every arm, from one trained model."""
    work = arguments.work / f"seed{seed}"
    common = [*SIZES, f"data.source={arguments.source}", "checkpoint.every=1000"]
    base = [*common, *MODEL, f"seed={seed}", "parallel.ep=1", "optimizer.warmup_steps=30"]
    train(CONFIGS / "demo.yaml", work / "base", base, arguments.steps, threads=1)
    folder = work / "base-model"
    if not folder.exists():
        command = [sys.executable, "-m", "moeyard.cli", "export", str(work / "base"), str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    losses = {}
    for arm, more in ARMS.items():
        # Not the model's seed: batches that are new to it and the same for every arm.
        options = [*common, f"seed={100 + seed}", f"start_from={folder}", *more]
        steps = 1 if STILL[0] in more else arguments.fine_tune_steps
        run_dir = work / arm.replace(",", "").replace(" ", "-")
        records = train(CONFIGS / "pregate.yaml", run_dir, options, steps, threads=1)
        losses[arm] = records[-1]["eval_loss_per_byte"]
        print(f"seed {seed}, {arm}: {losses[arm]:.4f} nats per byte", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="stdlib", help="text to train on, as data.source")
    parser.add_argument("--work", type=Path, default=Path("runs/pregate-finetune"))
    parser.add_argument("--steps", type=int, default=800, help="of the original")
    parser.add_argument("--fine-tune-steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side, one thread each")
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda seed: run_seed(seed, arguments), SEEDS))

    print(
        f"\nnats per held-out byte; {arguments.steps} steps, then {arguments.fine_tune_steps} more"
    )
    header = "".join(f"  seed {seed}" for seed in SEEDS)
    print(f"{'':26}{header}    mean   minus control (mean +- stdev of pairs)")
    rows = {}
    for arm in ARMS:
        own = [losses[arm] for losses in found]
        gaps = [losses[arm] - losses[CONTROL] for losses in found]
        rows[arm] = {
            "losses": own,
            "mean": statistics.mean(own),
            "minus_control_mean": statistics.mean(gaps),
            "minus_control_stdev": statistics.stdev(gaps),
        }
        print(
            f"{arm:26}"
            + "".join(f"  {loss:.4f}" for loss in own)
            + f"  {rows[arm]['mean']:.4f}   {rows[arm]['minus_control_mean']:+.4f} +- "
            f"{rows[arm]['minus_control_stdev']:.4f}"
        )
    path = write_results(
        "pregate_finetune",
        {
            "question": "held-out loss of a trained model that is pre-gated and trained on",
            "steps": arguments.steps,
            "fine_tune_steps": arguments.fine_tune_steps,
            "model": [*MODEL, *SIZES],
            "control": CONTROL,
            "arms": rows,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
