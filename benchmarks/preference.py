"""DPO on pairs whose truth is known: what is learnt, and what it costs on plain text.

    python benchmarks/preference.py --text FILE [--work DIR] [--jobs 2] [--model FOLDER]

A small byte model learns FILE and short chats, in which a line is answered by the next one, in
small letters or in capitals whatever those of the prompt. Then it is tuned on pairs: the chosen
answer is in the other case than its prompt, the rejected one is the same line in the same case. So
a model must read the prompt to prefer the right one. MoE against a dense model of equal active
size, all weights against LoRA, each with the better of two learning rates on the first seed. Three
seeds, each with its base and its order of pairs. Interrupt and start again as you like.

With ``--model`` a folder of bytes takes the place of the bases.
"""

import argparse
import json
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from preference_measures import WINDOW, chat_of, held_out, judge, share_moved

from moeyard.training.checkpoints.export import export

from report import write_results
from runs import train

TEMPLATE = Path(__file__).parent.parent / "configs" / "train" / "chat.jinja"
SEEDS = (0, 1, 2)
CASES = (str.lower, str.upper)
LENGTH, PAIRS, HELD_OUT_PAIRS = 128, 480, 64
PLAIN_BYTES = 12_000
"""Of the held-out text, whose loss tuning should not change."""
SIZES = {
    "MoE": {
        "moe": {
            "num_experts": 8,
            "d_expert": 64,
            "router": {"kind": "topk", "k": 2, "balance_loss": 0.01},
        }
    },
    "dense": {"d_ff": 128},
}
WAYS: dict[str, dict[str, Any]] = {
    "all": {"lrs": (3e-4, 1e-3), "train": ["train.parameters=all"]},
    "LoRA": {"lrs": (3e-3, 1e-2), "train": ["train.parameters=lora"]},
}
LORA = {
    "MoE": "{rank: 4, alpha: 8, targets: [attention, experts]}",
    "dense": "{rank: 4, alpha: 8, targets: [attention, mlp]}",
}
BASE: dict[str, Any] = {
    "model": {"d_model": 64, "num_layers": 3, "num_heads": 4, "max_positions": 256},
    "data": {"tokenizer": "bytes"},
    "train": {"sequence_length": WINDOW, "batch_sequences": 16, "log_every": 50},
    "optimizer": {"lr": 5e-3, "warmup_steps": 40},
    "checkpoint": {"every": 10_000, "keep": 1},
}
TUNING: dict[str, Any] = {
    "data": {"format": "preference", "chat_template": str(TEMPLATE)},
    "train": {
        "sequence_length": LENGTH,
        "batch_sequences": 8,
        "log_every": 10,
        "eval_sequences": HELD_OUT_PAIRS,
    },
    "optimizer": {"warmup_steps": 10, "weight_decay": 0},
    "checkpoint": {"every": 10_000, "keep": 1},
}


def write_data(text: Path, work: Path) -> str:
    """Write the bases' documents and the pairs; return the text that is held out of both."""
    whole = text.read_text(encoding="utf-8")
    cut = len(whole) * 9 // 10
    plain, draw = whole[:cut], random.Random(0)
    documents = [plain[at : at + 400] for at in range(0, len(plain), 400)]
    lines = [line for line in plain.splitlines() if 8 <= len(line) <= 24]
    chats = [
        f"<|user|>\n{draw.choice(CASES)(one)}\n<|assistant|>\n{draw.choice(CASES)(other)}"
        for one, other in pairwise(lines)
    ]
    mixed = documents + chats
    draw.shuffle(mixed)
    _write(work / "base.jsonl", [{"text": document} for document in mixed])
    places = draw.sample(range(len(lines) - 1), PAIRS + HELD_OUT_PAIRS)
    pairs = [pair(lines[place], lines[place + 1], draw.randrange(2)) for place in places]
    _write(work / "pairs.jsonl", pairs[:PAIRS])
    _write(work / "held-out.jsonl", pairs[PAIRS:])
    return whole[cut : cut + PLAIN_BYTES]


def pair(line: str, following: str, case: int) -> dict[str, str]:
    """Return a pair whose prompt is in one of the cases; the chosen answer is in the other."""
    chosen, rejected = CASES[1 - case](following), CASES[case](following)
    return {"prompt": CASES[case](line), "chosen": chosen, "rejected": rejected}


def _write(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def base_model(size: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Train a base and export it, or find it there."""
    if arguments.model is not None:
        return Path(arguments.model)
    name = f"base-{size}-seed{seed}"
    folder, run_dir = arguments.work / name, arguments.work / f"{name}-run"
    config = arguments.work / f"{name}.yaml"
    values = BASE | {"model": BASE["model"] | SIZES[size], "run_dir": str(run_dir), "seed": seed}
    config.write_text(yaml.safe_dump(values))
    source = [f"data.source={arguments.work / 'base.jsonl'}"]
    train(config, run_dir, source, arguments.base_steps, threads=1)
    if not folder.exists():
        export(run_dir, folder)
    return folder


def tune(
    size: str, way: str, seed: int, lr: float, arguments: argparse.Namespace, plain: str
) -> dict[str, Any]:
    """Tune a base, or continue an earlier run; return what was measured."""
    run_dir = arguments.work / f"{size}-{way}-lr{lr}-seed{seed}"
    folder = run_dir / "model"
    base = base_model(size, seed, arguments)
    own = [*WAYS[way]["train"], f"optimizer.lr={lr}", f"seed={seed}", f"start_from={base}"]
    own += [] if way == "all" else [f"lora={LORA[size]}"]
    config = arguments.work / "tuning.yaml"
    records = train(config, run_dir, own, arguments.steps, threads=1, measure="eval_accuracy")
    if not folder.exists():
        export(run_dir, folder)
    last = records[-1]
    found = {key: last[key] for key in last if key.startswith("eval_")}
    if last["load"]:
        found["busiest_over_mean"] = max(load["max_over_mean"] for load in last["load"])
    before, after = judge(base, arguments.work, plain), judge(folder, arguments.work, plain)
    found |= {f"{name}_before": value for name, value in before.items()} | after
    if last["load"]:
        chats = [chat_of(record) + record["chosen"] for record in held_out(arguments.work)]
        windows = [plain[at : at + WINDOW] for at in range(0, len(plain), WINDOW)]
        found["moved_in_chats"] = share_moved(base, folder, chats)
        found["moved_in_plain"] = share_moved(base, folder, windows)
    print(f"{run_dir.name}: {found['eval_loss']:.4f} {found['eval_accuracy']:.3f}", flush=True)
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Return the values of the seeds, their mean and their standard deviation."""
    return {"seeds": values, "mean": statistics.mean(values), "stdev": statistics.stdev(values)}


def run_arm(size: str, way: str, arguments: argparse.Namespace, plain: str) -> dict[str, Any]:
    """Return what an arm measured with the learning rate that is better on the first seed."""
    first = {lr: tune(size, way, SEEDS[0], lr, arguments, plain) for lr in WAYS[way]["lrs"]}
    lr = min(first, key=lambda lr: first[lr]["eval_loss"])
    runs = [first[lr], *(tune(size, way, seed, lr, arguments, plain) for seed in SEEDS[1:])]
    change = [run["plain_loss"] - run["plain_loss_before"] for run in runs]
    figures = {name: spread([run[name] for run in runs]) for name in runs[0]}
    losses = {str(lr): run["eval_loss"] for lr, run in first.items()}
    return {"lr": lr, "first_seed_by_lr": losses} | figures | {"plain_loss_change": spread(change)}


MEASURES = {
    "accuracy": "eval_accuracy",
    "margin": "eval_margin",
    "chosen reward": "eval_chosen_reward",
    "rejected reward": "eval_rejected_reward",
    "answers before": "answers_right_before",
    "answers after": "answers_right",
    "plain before": "plain_loss_before",
    "plain change": "plain_loss_change",
    "moved in chats": "moved_in_chats",
    "moved in plain": "moved_in_plain",
}


def show(rows: dict[str, dict[str, Any]], steps: int) -> None:
    """Print a table."""
    print(f"\nafter {steps} steps, mean +- stdev of {len(SEEDS)} seeds; margins of held-out pairs")
    print(f"{'':16}" + "".join(f"{arm:>20}" for arm in rows))
    print(f"{'learning rate':16}" + "".join(f"{row['lr']:>20}" for row in rows.values()))
    for name, key in MEASURES.items():
        cells = [
            f"{row[key]['mean']:.3f} +- {row[key]['stdev']:.3f}" if key in row else "-"
            for row in rows.values()
        ]
        print(f"{name:16}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="English text")
    parser.add_argument("--work", type=Path, default=Path("runs/preference"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--base-steps", type=int, default=240)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--model", help="MoE folder that reads bytes, in place of the bases")
    parser.add_argument("--without", nargs="+", default=[], help="arms, such as 'dense, LoRA'")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    plain = write_data(arguments.text, arguments.work)
    tuning = {"run_dir": str(arguments.work / "unset"), **TUNING}
    tuning["data"] |= {
        "source": str(arguments.work / "pairs.jsonl"),
        "eval_source": str(arguments.work / "held-out.jsonl"),
    }
    (arguments.work / "tuning.yaml").write_text(yaml.safe_dump(tuning))
    sizes = list(SIZES) if arguments.model is None else ["MoE"]
    arms = [(size, way) for size in sizes for way in WAYS]
    arms = [arm for arm in arms if ", ".join(arm) not in arguments.without]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        bases = [(size, seed) for seed in SEEDS for size in sizes]
        list(pool.map(lambda cell: base_model(*cell, arguments), bases))
        found = pool.map(lambda arm: run_arm(*arm, arguments, plain), arms)
        rows = {", ".join(arm): row for arm, row in zip(arms, found, strict=True)}
    show(rows, arguments.steps)
    figures = {"steps": arguments.steps, "base_steps": arguments.base_steps, "arms": rows}
    question = "what DPO learns of pairs with a known truth, and what it costs on plain text"
    print(f"written to {write_results('preference', {'question': question, **figures})}")


if __name__ == "__main__":
    main()
