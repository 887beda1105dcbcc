"""Opening a checkpoint of 1.4 GB against ``AutoModelForCausalLM.from_pretrained``: time and memory.

    python benchmarks/loading.py [--folder FOLDER] [--rounds 7]

A Qwen3-MoE of 0.7 B random bf16 parameters (12 layers of 32 experts), written by transformers into
FOLDER unless it exists. Each opening is a fresh process that has imported what it needs. A first
round warms the page cache and watches memory: peak is the largest anonymous resident memory during
the call, over that before it. Then both take turns unwatched, and only the time of the call counts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import write_results

SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 512, "intermediate_size": 1024,
}  # fmt: skip
NAMES = ("moeyard", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--open", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open is not None:
        action = peak_of if arguments.watch else seconds_of
        print(json.dumps(action(opener(arguments.open, arguments.folder))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not (folder / "config.json").exists():
            write(folder)
        compare(folder, arguments.rounds)


def write(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def compare(folder: Path, rounds: int) -> None:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    peaks = {name: in_a_process(name, folder, "--watch") for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds):
        for name in NAMES if number % 2 else reversed(NAMES):
            seconds[name].append(in_a_process(name, folder))
    rows = {}
    for name in NAMES:
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "peak_over_weights": peaks[name] / weights,
            "all_seconds": seconds[name],
        }
        print(
            f"{name:13} {rows[name]['seconds']:6.2f} s   peak anonymous memory "
            f"{rows[name]['peak_over_weights']:.2f} of the weights"
        )
    ratios = [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)]
    print(
        f"time against transformers, median of {rounds} pairs: {statistics.median(ratios):.2f} "
        f"(from {min(ratios):.2f} to {max(ratios):.2f})"
    )
    write_results("loading", {"weights_bytes": weights, "ratios": ratios, "rows": rows})


def in_a_process(name: str, folder: Path, *options: str) -> float:
    command = [sys.executable, __file__, "--open", name, "--folder", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def seconds_of(open_it: Callable[[], Any]) -> float:
    started = time.perf_counter()
    model = open_it()
    seconds = time.perf_counter() - started
    assert model is not None
    return seconds


def peak_of(open_it: Callable[[], Any]) -> int:
    before, peak, is_done = anonymous_bytes(), 0, False

    def watch() -> None:
        nonlocal peak
        while not is_done:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = open_it()
    is_done = True
    watcher.join()
    assert model is not None
    return max(peak, anonymous_bytes()) - before


def opener(name: str, folder: Path) -> Callable[[], Any]:
    """Import what a library needs and return its call."""
    if name == "moeyard":
        from moeyard.serving.loading import load

        return lambda: load(folder)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no RssAnon; run this on Linux")


if __name__ == "__main__":
    main()
