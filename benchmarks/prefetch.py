"""How much does prefetching help? Decoding with a quarter of the experts and a disk of known speed.

    python benchmarks/prefetch.py RUNS_DIR [--rates 400 800 1600] [--budget 25%]

RUNS_DIR holds the runs of benchmarks/router_loss.py; each is exported and decodes 3 prompts of 64
greedy tokens, one after the other, in three ways that take turns: all experts in memory; on demand
(least recently used first out, no reading ahead); with reading ahead. The disk is simulated: reads
come from the page cache, with pauses that limit all threads together to the given rate. Tokens must
be the same in all of them.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from paced_disk import PacedDisk

from moeyard.moe.models.language_model import LanguageModel
from moeyard.serving.experts.store import ExpertStore
from moeyard.serving.loading import open_model

from report import write_results

ARMS = ("topk", "hash", "pregated", "preattention")
PROMPTS = ("def read(path, ", "class Config:\n    ", "import os\n\nfor name in ")
NEW_TOKENS = 64
ROUNDS = 5


def decode(model: LanguageModel) -> tuple[float, list[list[int]]]:
    """Return seconds of all prompts and what was generated."""
    ids = [torch.tensor([list(prompt.encode())]) for prompt in PROMPTS]
    started = time.perf_counter()
    answers = [model.generate(row, NEW_TOKENS, temperature=0)[0].tolist() for row in ids]
    return time.perf_counter() - started, answers


def totals(store: ExpertStore) -> dict[str, float]:
    names = ("hits", "misses", "prefetch_issued", "prefetch_useful", "prefetch_late",
             "prefetch_wasted", "bytes_read", "stall_s")  # fmt: skip
    layers = store.statistics.layers.values()
    return {name: sum(getattr(layer, name) for layer in layers) for name in names}


def compare(folder: Path, budget: str, rates: list[float], disk: PacedDisk) -> list[dict]:
    """Measure one model at all rates."""
    resident, _ = open_model(folder)
    modes = {"on demand": open_model(folder, expert_memory=budget)}
    modes["read ahead"] = open_model(folder, expert_memory=budget)
    for _, layer in modes["on demand"][0].decoder.moe_layers():
        layer.experts.announce = lambda routing: None
    _, expected = decode(resident)
    rows = []
    for rate in rates:
        seconds: dict[str, list[float]] = {"resident": [], "on demand": [], "read ahead": []}
        traffic: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
        for turn in range(ROUNDS + 1):
            disk.bytes_per_s = rate * 1e6
            for name, (model, store) in modes.items():
                before = totals(store)
                elapsed, answers = decode(model)
                assert answers == expected, f"{name} gave other tokens than the resident model"
                if turn:
                    seconds[name].append(elapsed)
                    after = totals(store)
                    traffic[name].append({key: after[key] - before[key] for key in after})
            disk.bytes_per_s = None
            elapsed, _ = decode(resident)
            if turn:
                seconds["resident"].append(elapsed)
        num_tokens = NEW_TOKENS * len(PROMPTS)
        for name, values in seconds.items():
            row = {
                "rate_mb_s": rate,
                "mode": name,
                "tokens_per_s": num_tokens / statistics.median(values),
            }
            row["of_resident"] = statistics.median(
                r / v for r, v in zip(seconds["resident"], values, strict=True)
            )
            if name in traffic:
                row |= {
                    key: statistics.median(t[key] for t in traffic[name])
                    for key in traffic[name][0]
                }
            rows.append(row)
    for _, store in modes.values():
        store.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[400, 800, 1600], help="MB/s")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disk, table = PacedDisk(), {}
    print(f"{'router':13} {'MB/s':>5} {'mode':11} tokens/s  of resident   MB moved  stall s   "
          "hits  misses  ahead: useful   late  wasted")  # fmt: skip
    for arm in ARMS:
        folder = arguments.runs / f"{arm}-export"
        if not folder.exists():
            command = [sys.executable, "-m", "moeyard.cli", "export"]
            run = arguments.runs / f"{arm}-seed0"
            subprocess.run([*command, str(run), str(folder)], check=True, stdout=subprocess.DEVNULL)
        table[arm] = compare(folder, arguments.budget, arguments.rates, disk)
        for row in table[arm]:
            line = f"{arm:13} {row['rate_mb_s']:5.0f} {row['mode']:11} {row['tokens_per_s']:8.1f}"
            line += f"  {row['of_resident']:11.2f}"
            if "hits" in row:
                line += f"  {row['bytes_read'] / 1e6:9.1f} {row['stall_s']:8.2f} {row['hits']:6.0f}"
                line += f"  {row['misses']:6.0f}  {row['prefetch_useful']:13.0f}"
                line += f" {row['prefetch_late']:6.0f}  {row['prefetch_wasted']:6.0f}"
            print(line, flush=True)
    path = write_results(
        "prefetch",
        {
            "question": "decode speed with reading ahead, on demand and resident",
            "budget": arguments.budget,
            "new_tokens": NEW_TOKENS,
            "prompts": len(PROMPTS),
            "threads": arguments.threads,
            "table": table,
        },
    )
    print(f"written to {path}; all answers were the resident model's")


if __name__ == "__main__":
    main()
