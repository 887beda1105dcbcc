"""Does a Switch encoder-decoder learn pairs better than a dense one of equal active size?

    python benchmarks/encoder_decoder.py [--work DIR] [--steps 600] [--jobs 2] [--seeds 3]

Switch Transformer (Fedus et al. 2022) puts one of many experts in the place of every other MLP of a
T5, and reports a lower loss after the same number of steps at the same work for a token. Here the
task is a cipher: the first letter of a source is the key, and the target has another letter for
each of the others. Each key has its own letters, which were drawn, so they must be learnt by heart.
Held-out sources are new combinations. Three seeds, paired: the same batches in both arms. Interrupt
and start again as you like.
"""

import argparse
import json
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from report import write_results
from runs import train

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEYS, LENGTH = 12, 4
"""Ciphers, and letters behind the key."""
PAIRS, HELD_OUT = 30_000, 800
MODEL = {
    "kind": "encoder_decoder",
    "d_model": 64,
    "num_layers": 4,
    "num_heads": 4,
    "d_ff": 64,
    "max_positions": 32,
}
SWITCH = {
    "num_experts": 16,
    "d_expert": 64,
    "activation": "relu",
    "router": {"kind": "topk", "k": 1, "renormalize": False},
}
ARMS: dict[str, list[str]] = {
    "dense": [],
    "switch": [f"model.moe={json.dumps(SWITCH)}", "model.dense_layers=[0, 2]"],
}


def write_data(work: Path) -> tuple[Path, Path]:
    """Write the pairs as JSON lines, the same every time."""
    draw = random.Random(7)
    ciphers = {key: draw.sample(LETTERS, len(LETTERS)) for key in LETTERS[:KEYS]}
    work.mkdir(parents=True, exist_ok=True)
    paths = (work / "train.jsonl", work / "held-out.jsonl")
    for path, count in zip(paths, (PAIRS, HELD_OUT), strict=True):
        lines = []
        for _ in range(count):
            key, letters = draw.choice(LETTERS[:KEYS]), draw.choices(LETTERS, k=LENGTH)
            target = "".join(ciphers[key][LETTERS.index(letter)] for letter in letters)
            lines.append(json.dumps({"source": key + "".join(letters), "target": target}))
        text = "\n".join(lines) + "\n"
        if not path.exists() or path.read_text() != text:  # a resumed run must find the same file
            path.write_text(text)
    return paths


def run_one(arm: str, seed: int, steps: int, work: Path, config: Path) -> list[dict]:
    """Train one model, or continue an earlier run, and return its metrics."""
    run_dir = work / f"{arm}-seed{seed}"
    overrides = [f"seed={seed}", *ARMS[arm]]
    records = train(config, run_dir, overrides, steps, threads=1, measure="eval_loss")
    print(f"{run_dir.name}: {records[-1]['eval_loss']:.4f}", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/encoder-decoder"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    work, steps = arguments.work, arguments.steps
    train_path, held_out_path = write_data(work)
    config = work / "encoder_decoder.yaml"
    values = {
        "run_dir": str(work / "run"),
        "model": MODEL,
        "data": {
            "format": "pairs",
            "source": str(train_path),
            "eval_source": str(held_out_path),
        },
        "train": {
            "steps": steps,
            "sequence_length": 6,
            "batch_sequences": 128,
            "log_every": 50,
            "eval_sequences": HELD_OUT,
        },
        "optimizer": {"lr": 4e-3, "warmup_steps": 40},
        "checkpoint": {"every": 200, "keep": 1},
    }
    config.write_text(yaml.safe_dump(values))
    seeds = range(arguments.seeds)
    grid = [(arm, seed) for seed in seeds for arm in ARMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda cell: run_one(*cell, steps, work, config), grid)
        records = {cell: runs[-1] for cell, runs in zip(grid, found, strict=True)}
    rows = {arm: summary(arm, seeds, records) for arm in ARMS}
    show(rows, steps)
    path = write_results(
        "encoder_decoder",
        {
            "question": "held-out loss of a Switch encoder-decoder and a dense one",
            "steps": steps,
            "model": MODEL,
            "switch": SWITCH,
            "keys": KEYS,
            "letters_of_a_source": LENGTH,
            "pairs": PAIRS,
            "arms": rows,
        },
    )
    print(f"written to {path}")


def summary(arm: str, seeds: range, records: dict[tuple[str, int], dict]) -> dict:
    """Return an arm's figures, and Switch's gain over it in pairs of the same seed."""
    own = [records[arm, seed] for seed in seeds]
    gains = [
        records[arm, seed]["eval_loss"] - records["switch", seed]["eval_loss"] for seed in seeds
    ]
    return {
        "loss": [record["eval_loss"] for record in own],
        "loss_mean": statistics.mean(record["eval_loss"] for record in own),
        "accuracy_mean": statistics.mean(record["eval_accuracy"] for record in own),
        "tokens": [record["tokens"] for record in own],
        "busiest_over_mean": [
            max((load["max_over_mean"] for load in record.get("load", [])), default=None)
            for record in own
        ],
        "switch_gains_mean": statistics.mean(gains),
        "switch_gains_stdev": statistics.stdev(gains) if len(gains) > 1 else None,
    }


def show(rows: dict[str, dict], steps: int) -> None:
    """Print the table."""
    print(f"\nheld-out loss in nats for a target token after {steps} steps")
    print("arm      each seed               mean     right tokens   Switch is lower by")
    for arm, row in rows.items():
        each = " ".join(f"{value:.4f}" for value in row["loss"])
        stdev = row["switch_gains_stdev"]
        spread_of = "" if stdev is None else f" +- {stdev:.4f}"
        print(
            f"{arm:7}  {each}  {row['loss_mean']:.4f}   {row['accuracy_mean']:.4f}         "
            f"{row['switch_gains_mean']:+.4f}{spread_of}"
        )


if __name__ == "__main__":
    main()
