"""Do LoRA experts (LLaVA-MoLE) lose less than plain LoRA on a mix of two conflicting data sets?

    python benchmarks/lora_experts.py --pretrain FILE --text FILE [--work DIR] [--jobs 2]

A small dense byte model learns FILE of ``--pretrain``. Then it is tuned, frozen, on ``--text`` in
two ciphers: set a is in lower case with each letter moved by 13 places of the alphabet, set b in
upper case with letters moved by 7. The same words so ask for different letters, and the text itself
tells which. Every arm sees as many windows: of one set, or of both mixed. Plain LoRA has the rank
that a token goes through with LoRA experts, or that of all experts together. Three seeds, paired:
the same base and the same batches. Interrupt and start again as you like.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from moeyard.training.checkpoints.export import export

from report import write_results
from runs import train

SEEDS = (0, 1, 2)
CIPHERS = {"a": (str.lower, 13), "b": (str.upper, 7)}
CHARACTERS = 400_000
"""Of the text: more than the runs see."""
DOCUMENT = 1000
"""Characters in one cipher before the other one may follow."""
RANK, EXPERTS = 2, 4
MLPS = "targets: [attention, mlp]"
ARMS = {
    "plain": f"{{rank: {RANK}, alpha: {2 * RANK}, {MLPS}}}",
    "experts": f"{{rank: {RANK}, alpha: {2 * RANK}, {MLPS}, experts: {EXPERTS}}}",
    "experts, weighted": f"{{rank: {RANK}, alpha: {2 * RANK}, {MLPS}, experts: {EXPERTS}, "
    "weighting: probability}",
    "plain, all ranks": f"{{rank: {RANK * EXPERTS}, alpha: {2 * RANK * EXPERTS}, {MLPS}}}",
}
ALONE = ("plain", "experts, weighted")
"""Arms that also learn one set alone."""
BASE = {
    "seed": 0,
    "model": {"d_model": 96, "num_layers": 3, "num_heads": 4, "d_ff": 256, "max_positions": 256},
    "data": {"tokenizer": "bytes"},
    "train": {"sequence_length": 64, "batch_sequences": 16, "log_every": 50},
    "optimizer": {"lr": 4e-3, "warmup_steps": 50},
    "checkpoint": {"every": 1000, "keep": 1},
}
TUNING = {
    "train": {
        "parameters": "lora",
        "sequence_length": 128,
        "batch_sequences": 8,
        "log_every": 50,
        "eval_sequences": 64,
    },
    "optimizer": {"lr": 1e-2, "warmup_steps": 20, "weight_decay": 0},
    "checkpoint": {"every": 1000, "keep": 1},
}


def shifted(text: str, places: int) -> str:
    """Move every letter by ``places`` of the alphabet."""
    moved = {}
    for first in "aA":
        for letter in range(26):
            moved[ord(first) + letter] = chr(ord(first) + (letter + places) % 26)
    return text.translate(moved)


def write_sets(text: Path, folder: Path) -> None:
    """Write each set, and both in turn, to train on and held out."""
    whole = text.read_text(encoding="utf-8")[:CHARACTERS]
    pieces = [whole[at : at + DOCUMENT] for at in range(0, len(whole), DOCUMENT)]
    cut = len(pieces) * 9 // 10
    for part, own in (("train", pieces[:cut]), ("held_out", pieces[cut:])):
        in_cipher = {
            name: [shifted(to_case(piece), places) for piece in own]
            for name, (to_case, places) in CIPHERS.items()
        }
        in_turn = [piece for pair in zip(*in_cipher.values(), strict=True) for piece in pair]
        for name, documents in {**in_cipher, "mix": in_turn}.items():
            lines = [json.dumps({"text": document}) for document in documents]
            (folder / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def base_model(arguments: argparse.Namespace) -> Path:
    """Train the dense model and export it, or find it there."""
    folder, run_dir = arguments.work / "base", arguments.work / "base-run"
    config = arguments.work / "base.yaml"
    config.write_text(yaml.safe_dump({"run_dir": str(run_dir), **BASE}))
    data = [f"data.source={arguments.pretrain}"]
    train(config, run_dir, data, arguments.pretrain_steps, threads=1)
    if not folder.exists():
        export(run_dir, folder)
    return folder


def tune(arm: str, data: str, seed: int, arguments: argparse.Namespace) -> list[dict]:
    """Tune the base on a set, or continue an earlier run, and return its metrics."""
    work = arguments.work
    run_dir = work / f"{arm.replace(', ', '-').replace(' ', '-')}-{data}-seed{seed}"
    own = [f"seed={seed}", f"start_from={work / 'base'}", f"lora={ARMS[arm]}"]
    own += [
        f"data.source={work / data}.train.jsonl",
        f"data.eval_source={work / data}.held_out.jsonl",
    ]
    if data == "mix":  # as many windows of each set as the others hold out
        own.append(f"train.eval_sequences={2 * TUNING['train']['eval_sequences']}")
    records = train(work / "tuning.yaml", run_dir, own, arguments.steps, threads=1)
    print(f"{run_dir.name}: {records[-1]['eval_loss_per_byte']:.4f} nats per byte", flush=True)
    return records


def worst_load(records: list[dict]) -> float:
    """Return the largest max/mean of any layer, over the rows of the last logged steps."""
    layers = zip(*(record["expert_tokens"] for record in records[-3:]), strict=True)
    summed = [[sum(step) for step in zip(*layer, strict=True)] for layer in layers]
    return max((max(counts) * len(counts) / sum(counts) for counts in summed), default=1.0)


def summary(losses: dict[tuple[str, str, int], float]) -> dict[str, dict]:
    """Return each arm's losses, what it is ahead of plain LoRA, and what the mix costs it."""
    rows: dict[str, dict] = {}
    for arm in ARMS:
        mixed = [losses[arm, "mix", seed] for seed in SEEDS]
        gaps = [losses[arm, "mix", seed] - losses["plain", "mix", seed] for seed in SEEDS]
        rows[arm] = {"mix": spread(mixed), "mix_minus_plain": spread(gaps)}
        if (arm, "a", SEEDS[0]) in losses:
            apart = [(losses[arm, "a", seed] + losses[arm, "b", seed]) / 2 for seed in SEEDS]
            cost = [mix - alone for mix, alone in zip(mixed, apart, strict=True)]
            rows[arm] |= {"apart": spread(apart), "mix_minus_apart": spread(cost)}
    return rows


def spread(values: list[float]) -> dict:
    """Return the values of the seeds, their mean and their standard deviation."""
    return {"seeds": values, "mean": statistics.mean(values), "stdev": statistics.stdev(values)}


def show(rows: dict[str, dict], steps: int) -> None:
    """Print a table."""
    print(f"\nnats per held-out byte after {steps} steps, mean +- stdev of {len(SEEDS)} seeds")
    titles = ("mix", "mix_minus_plain", "apart", "mix_minus_apart")
    print(f"{'':20}" + "".join(f"{title.replace('_', ' '):>20}" for title in titles))
    for arm, row in rows.items():
        cells = [
            f"{row[title]['mean']:.4f} +- {row[title]['stdev']:.4f}" if title in row else ""
            for title in titles
        ]
        print(f"{arm:20}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrain", type=Path, required=True, help="text for the base")
    parser.add_argument("--text", type=Path, required=True, help="text to tune on, in two ciphers")
    parser.add_argument("--work", type=Path, default=Path("runs/lora-experts"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pretrain-steps", type=int, default=900)
    parser.add_argument("--mix-only", action="store_true", help="leave the sets alone out")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_sets(arguments.text, arguments.work)
    base_model(arguments)
    tuning = {"run_dir": str(arguments.work / "unset"), **TUNING}
    (arguments.work / "tuning.yaml").write_text(yaml.safe_dump(tuning))
    grid = [(arm, "mix", seed) for seed in SEEDS for arm in ARMS]
    if not arguments.mix_only:
        grid += [(arm, data, seed) for seed in SEEDS for data in CIPHERS for arm in ALONE]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(grid, pool.map(lambda g: tune(*g, arguments), grid), strict=True))
    losses = {cell: records[-1]["eval_loss_per_byte"] for cell, records in found.items()}
    rows = summary(losses)
    show(rows, arguments.steps)
    for arm, row in rows.items():
        if "experts" in arm:
            row["worst_load"] = [worst_load(found[arm, "mix", seed]) for seed in SEEDS]
            loads = "  ".join(f"{load:.2f}" for load in row["worst_load"])
            print(f"{arm}: worst layer's max/mean on the mix, by seed: {loads}")
    path = write_results(
        "lora_experts",
        {
            "question": "LoRA experts against plain LoRA on two conflicting sets and their mix",
            "steps": arguments.steps,
            "lora": ARMS,
            "arms": rows,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
