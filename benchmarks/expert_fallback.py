"""What missing experts cost on a slow disk, and what low-bit copies and correction make of it.

    python benchmarks/expert_fallback.py MODEL --copies FOLDER ... --text FILE [--disk 60]

MODEL is in bf16, each of the copies is MODEL after ``moeyard convert --dtype int8`` or ``int4``. A
share of the experts fits into memory; the disk has the given speed (paced_disk.py). Each way
answers the same prompts, in turns with the exact model, and is measured as ``moeyard price`` does.
The last rows are exact models that may use as much memory as slots and copies take together.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from paced_disk import PacedDisk

from moeyard.moe.folders.expert_slots import expert_bytes
from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.evaluation.price import Arm, Plan, measure
from moeyard.serving.experts.copies import copies_bytes
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.loading import open_model

from report import write_results

ABOVE = 0.3
PERIODS = (8, 16)
THRESHOLD = 0.1


def ways(copies: list[Path], periods: list[int]) -> dict[str, StoreOptions]:
    """Return the options of each way by name."""
    found = {}
    for copy in copies:
        bits = f"int{ModelFolder(copy).packed.bits}"
        found[f"fallback {bits}"] = StoreOptions(fallback=copy)
        found[f"fallback {bits} above {ABOVE}"] = StoreOptions(fallback=copy, fallback_above=ABOVE)
        for period in periods:
            options = StoreOptions(fallback=copy, correction=period)
            found[f"fallback {bits} correction {period}"] = options
        options = StoreOptions(
            fallback=copy, correction=periods[-1], correction_threshold=THRESHOLD
        )
        found[f"fallback {bits} correction {periods[-1]} threshold {THRESHOLD}"] = options
    return found


def arm(folder: Path, memory: str, options: StoreOptions) -> Arm:
    """Open a model in bf16."""
    model, store = open_model(folder, "bf16", expert_memory=memory, options=options)
    files = ModelFolder(folder)
    size = expert_bytes(files.config, torch.bfloat16, files.packed)
    return Arm(model=model, store=store, expert_bytes=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--copies", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", default="", metavar="TEXT", help="ways whose name has TEXT")
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--disk", type=float, default=60.0, help="MB/s")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--periods", type=int, nargs="+", default=PERIODS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disk = PacedDisk()
    plan = Plan(
        length=256, steps=arguments.steps, answers=arguments.answers, tokens=arguments.tokens
    )
    text = arguments.text.read_text()
    rows, memories = {}, {}
    experts = ModelFolder(arguments.model)
    size = expert_bytes(experts.config, torch.bfloat16, None)
    exact = arm(arguments.model, arguments.memory, StoreOptions())
    for name, options in ways(arguments.copies, list(arguments.periods)).items():
        if arguments.only not in name:
            continue
        lossy = arm(arguments.model, arguments.memory, options)
        copies = copies_bytes(options, torch.bfloat16)
        memories[name] = lossy.store.num_slots * size + copies
        rows[name] = measured(exact, lossy, text, plan, disk, arguments.disk)
        report(name, rows[name], memories[name])
    for copies in sorted(set(memories.values())):
        name = f"exact, {copies / 2**20:.1f} MiB"
        more = arm(arguments.model, f"{copies}B", StoreOptions())
        rows[name] = measured(exact, more, text, plan, disk, arguments.disk)
        memories[name] = copies
        report(name, rows[name], copies)
    settings = {name: str(value) for name, value in vars(arguments).items() if name in SETTINGS}
    write_results("expert_fallback", {"settings": settings, "rows": rows, "bytes": memories})


SETTINGS = ("memory", "disk", "steps", "answers", "tokens", "threads")


def measured(
    exact: Arm, lossy: Arm, text: str, plan: Plan, disk: PacedDisk, mb_per_s: float
) -> dict[str, object]:
    """Measure a way next to the exact model; the disk is slow in the meantime."""
    before = [counts(one) for one in (exact, lossy)]
    disk.bytes_per_s = mb_per_s * 1e6
    first, second, tokens = measure(exact, lossy, text, plan, depends_on_memory=True)
    disk.bytes_per_s = None
    after = [counts(one) for one in (exact, lossy)]
    correction = lossy.model.correction
    return {
        "exact": first.model_dump(),
        "lossy": second.model_dump(),
        "tokens": tokens,
        "advance": None if correction is None else correction.mean_advance,
        "counts": [{k: a[k] - b[k] for k in a} for a, b in zip(after, before, strict=True)],
    }


def counts(one: Arm) -> dict[str, int]:
    """Return the store's counters over all layers."""
    layers = [asdict(layer) for layer in one.store.statistics.layers.values()]
    names = ("hits", "misses", "copied", "prefetch_late", "copied_rows")
    return {name: sum(layer[name] for layer in layers) for name in names}


def report(name: str, row: dict, memory: int) -> None:
    exact, lossy = row["exact"], row["lossy"]
    advance = "" if row["advance"] is None else f"  {row['advance']:.2f} tokens per check"
    print(
        f"{name:38} perplexity {lossy['perplexity']:.4f} ({exact['perplexity']:.4f})  "
        f"KiB per expert {lossy['expert_bytes'] / 1024:6.1f} ({exact['expert_bytes'] / 1024:.1f})  "
        f"tokens/s {lossy['tokens_per_s']:6.2f} ({exact['tokens_per_s']:.2f})  "
        f"{memory / 2**20:5.1f} MiB{advance}",
        flush=True,
    )


if __name__ == "__main__":
    main()
