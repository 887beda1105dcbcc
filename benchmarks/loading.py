"""Opening a checkpoint of 1.4 GB beside ``AutoModelForCausalLM.from_pretrained``: time and memory.

    python benchmarks/loading.py [--folder FOLDER] [--rounds 7]

A Qwen3-MoE of 0.7 B random bf16 parameters (12 layers of 32 experts), written by transformers into
FOLDER unless it is there. Each opening is a fresh process that has imported what it needs; a first
round warms the page cache and is left out, then both take turns. Time is that of the call alone;
peak is the largest anonymous resident memory during it, over that before it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

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
    arguments = parser.parse_args()
    if arguments.open is not None:
        print(json.dumps(measure(arguments.open, arguments.folder)))
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
    found: dict[str, list[dict]] = {name: [] for name in NAMES}
    for number in range(rounds + 1):
        for name in NAMES if number % 2 else reversed(NAMES):
            command = [sys.executable, __file__, "--open", name, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if number:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = {}
    for name, runs in found.items():
        rows[name] = {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "peak_over_weights": max(run["peak_bytes"] for run in runs) / weights,
            "all_seconds": [run["seconds"] for run in runs],
        }
        print(
            f"{name:13} {rows[name]['seconds']:6.2f} s   peak anonymous memory "
            f"{rows[name]['peak_over_weights']:.2f} of the weights"
        )
    pairs = zip(*(rows[name]["all_seconds"] for name in NAMES), strict=True)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print(f"time against transformers, median of {rounds} pairs: {ratio:.2f}")
    write_results("loading", {"weights_bytes": weights, "ratio": ratio, "rows": rows})


def measure(name: str, folder: Path) -> dict[str, float]:
    open_it = opener(name, folder)
    before, peak, is_done = anonymous_bytes(), 0, False

    def watch() -> None:
        nonlocal peak
        while not is_done:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model = open_it()
    seconds = time.perf_counter() - started
    is_done = True
    watcher.join()
    assert model is not None
    return {"seconds": seconds, "peak_bytes": max(peak, anonymous_bytes()) - before}


def opener(name: str, folder: Path):
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
