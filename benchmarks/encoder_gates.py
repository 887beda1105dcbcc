"""Is COMET a better gate than top-k, hash and DSelect-k in an encoder that classifies texts?

    python benchmarks/encoder_gates.py [--work DIR] [--steps 200] [--jobs 2] [--seeds 3]

COMET (Ibrahim et al. 2023) reports better accuracy than those gates, in BERT among others. Here a
small encoder says which package of Python's standard library a passage comes from. Held-out
passages are from modules that nothing was trained on. Three seeds, paired: the same attention at
the start and the same batches in every arm. With --texts each file is a source, and its end is held
out. Interrupt and start again as you like.
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from report import write_results
from runs import train

PACKAGES = "asyncio ctypes email encodings http importlib json logging multiprocessing unittest xml"
PASSAGE = 160
"""Characters of a passage."""
VOCABULARY = 1024
MOST = 400
"""Passages of a source, so that sources do not differ much."""
HELD_OUT = 4
"""One module of so many is held out, or this part of a file."""
ARMS = {
    "topk": "{kind: topk, k: 2}",
    "hash": "{kind: hash, k: 2}",
    "dselect": "{kind: dselect, k: 2}",
    "comet": "{kind: comet, k: 2}",
    "comet-even": "{kind: comet, k: 2, importance_loss: 0.1}",
}
MODEL = {
    "kind": "encoder",
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 4,
    "max_positions": 96,
    "moe": {"num_experts": 8, "d_expert": 64},
}


def passages_of(text: str) -> list[str]:
    """Cut a text into passages; a last short one is left out."""
    cut = [text[start : start + PASSAGE] for start in range(0, len(text), PASSAGE)]
    return [passage for passage in cut if len(passage.strip()) > PASSAGE // 2]


def standard_library() -> dict[str, tuple[list[str], list[str]]]:
    """Return training and held-out passages of each package."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for name in PACKAGES.split():
        modules = sorted(path for path in (root / name).rglob("*.py") if "test" not in path.parts)
        sides: tuple[list[str], list[str]] = ([], [])
        for number, path in enumerate(modules):
            passages = passages_of(path.read_text(encoding="utf-8", errors="ignore"))
            sides[number % HELD_OUT == 1].extend(passages)
        found[name] = sides
    return found


def files(paths: list[Path]) -> dict[str, tuple[list[str], list[str]]]:
    """Return training and held-out passages of each file."""
    found = {}
    for path in paths:
        passages = passages_of(path.read_text(encoding="utf-8"))
        place = len(passages) - len(passages) // HELD_OUT
        found[path.stem] = (passages[:place], passages[place:])
    return found


def spread(passages: list[str], most: int) -> list[str]:
    """Return at most so many passages, evenly from all."""
    count = min(most, len(passages))
    return [passages[index * len(passages) // count] for index in range(count)]


def write_data(sources: dict[str, tuple[list[str], list[str]]], work: Path) -> tuple[Path, Path]:
    """Write the passages as JSON lines."""
    work.mkdir(parents=True, exist_ok=True)
    paths = (work / "train.jsonl", work / "held-out.jsonl")
    for side, path in enumerate(paths):
        most = MOST if side == 0 else MOST // HELD_OUT
        lines = [
            json.dumps({"text": passage, "label": name})
            for name, both in sources.items()
            for passage in spread(both[side], most)
        ]
        text = "\n".join(lines) + "\n"
        if not path.exists() or path.read_text() != text:  # a resumed run must find the same file
            path.write_text(text)
    return paths


def learn_tokenizer(texts: Path, work: Path) -> Path:
    """Return a folder with a tokenizer of the training passages."""
    folder = work / "tokens"
    if not folder.exists():
        command = [sys.executable, "-m", "moeyard.cli", "tokenize", str(texts), str(folder)]
        subprocess.run([*command, "--vocab-size", str(VOCABULARY)], check=True)
    return folder / "tokenizer"


def run_one(arm: str, seed: int, steps: int, work: Path, config: Path) -> list[dict]:
    """Train one model, or continue an earlier run, and return its metrics."""
    run_dir = work / f"{arm}-seed{seed}"
    router = f"model.moe.router={ARMS[arm]}"
    records = train(
        config, run_dir, [f"seed={seed}", router], steps, threads=1, measure="eval_accuracy"
    )
    print(f"{run_dir.name}: {records[-1]['eval_accuracy']:.4f}", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/encoder-gates"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--texts", type=Path, nargs="+", metavar="FILE", help="a source each")
    arguments = parser.parse_args()
    work = arguments.work
    sources = files(arguments.texts) if arguments.texts else standard_library()
    train_path, held_out_path = write_data(sources, work)
    config = work / "encoder.yaml"
    values = {
        "run_dir": str(work / "run"),
        "model": MODEL,
        "data": {
            "format": "classify",
            "source": str(train_path),
            "eval_source": str(held_out_path),
            "tokenizer": str(learn_tokenizer(train_path, work)),
        },
        "train": {
            "steps": arguments.steps,
            "sequence_length": 96,
            "batch_sequences": 32,
            "log_every": 25,
            "eval_sequences": 4096,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 40},
        "checkpoint": {"every": 200, "keep": 1},
    }
    config.write_text(yaml.safe_dump(values))
    seeds = range(arguments.seeds)
    grid = [(arm, seed) for seed in seeds for arm in ARMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda cell: run_one(*cell, arguments.steps, work, config), grid)
        records = {cell: runs[-1] for cell, runs in zip(grid, found, strict=True)}
    rows = {arm: summary(arm, seeds, records) for arm in ARMS}
    show(rows, arguments.steps, len(sources))
    path = write_results(
        "encoder_gates",
        {
            "question": "held-out accuracy of an encoder's gates",
            "steps": arguments.steps,
            "model": MODEL,
            "routers": ARMS,
            "sources": {name: [len(side) for side in both] for name, both in sources.items()},
            "arms": rows,
        },
    )
    print(f"written to {path}")


def summary(arm: str, seeds: range, records: dict[tuple[str, int], dict]) -> dict:
    """Return an arm's figures, and COMET's gain over it in pairs of the same seed."""
    own = [records[arm, seed] for seed in seeds]
    gains = [
        records["comet", seed]["eval_accuracy"] - records[arm, seed]["eval_accuracy"]
        for seed in seeds
    ]
    return {
        "accuracy": [record["eval_accuracy"] for record in own],
        "accuracy_mean": statistics.mean(record["eval_accuracy"] for record in own),
        "macro_f1_mean": statistics.mean(record["eval_macro_f1"] for record in own),
        "loss_mean": statistics.mean(record["eval_loss"] for record in own),
        "experts_a_token": statistics.mean(
            sum(map(sum, record["expert_tokens"]))
            / (record["step_tokens"] * len(record["expert_tokens"]))
            for record in own
        ),
        "busiest_over_mean": max(
            load["max_over_mean"] for record in own for load in record["load"]
        ),
        "comet_minus_this_mean": statistics.mean(gains),
        "comet_minus_this_stdev": statistics.stdev(gains) if len(gains) > 1 else None,
    }


def show(rows: dict[str, dict], steps: int, num_sources: int) -> None:
    """Print the table."""
    print(f"\nheld-out accuracy after {steps} steps, {num_sources} sources")
    print(
        "arm         each seed             mean    macro F1   loss   experts a token   "
        "busiest/mean   COMET minus this"
    )
    for arm, row in rows.items():
        each = " ".join(f"{value:.4f}" for value in row["accuracy"])
        stdev = row["comet_minus_this_stdev"]
        spread_of = "" if stdev is None else f" +- {stdev:.4f}"
        print(
            f"{arm:10}  {each}  {row['accuracy_mean']:.4f}  {row['macro_f1_mean']:.4f}     "
            f"{row['loss_mean']:.4f}  {row['experts_a_token']:.2f}             "
            f"{row['busiest_over_mean']:.2f}          "
            f"{row['comet_minus_this_mean']:+.4f}{spread_of}"
        )


if __name__ == "__main__":
    main()
