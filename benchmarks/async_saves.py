"""How long does a save keep training waiting, written at once and asynchronously?

python benchmarks/async_saves.py [--rounds 3] [--folder FOLDER]

Two ranks train 105 million parameters, half of the experts on each (1.3 GB of checkpoint). The
arms take turns: no saves, saves that training waits for, asynchronous saves. The stall of a save is
the phase ``checkpoint`` of its step. The cost of a save is what a run with saves takes longer than
one without, over the same steps, so it has what writing costs the steps next to it. The last save
of a run is never asynchronous and is left out.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import environment, write_results
from runs import read_metrics

ARMS = {
    "no saves": ["checkpoint.every=1000000"],
    "training waits": [],
    "asynchronous": ["checkpoint.asynchronous=true"],
}
EVERY, STEPS, FIRST = 12, 40, 4
"""Steps before ``FIRST`` are left out of times: memory is new there."""
CONFIG: dict[str, Any] = {
    "seed": 1,
    "model": {
        "d_model": 512,
        "num_layers": 4,
        "num_heads": 8,
        "max_positions": 128,
        "moe": {"num_experts": 16, "d_expert": 1024, "router": {"kind": "topk", "k": 2}},
    },
    "train": {
        "steps": STEPS,
        "sequence_length": 32,
        "batch_sequences": 4,
        "log_every": 1,
        "eval_sequences": 4,
    },
    "checkpoint": {"every": EVERY, "keep": 1},
    "parallel": {"ep": 2},
}


def main() -> None:
    """Run all arms in turn and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where runs are written; a new one in /tmp")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moeyard-async-", dir=chosen.folder))
    text = folder / "text.txt"
    text.write_text("".join(f"def f{n}(a):\n    return a * {n}\n" for n in range(20_000)))
    values = {**CONFIG, "run_dir": str(folder / "unset"), "data": {"source": str(text)}}
    (folder / "run.yaml").write_text(json.dumps(values))
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for number in range(chosen.rounds):
        for arm, options in ARMS.items():
            run = one_run(folder, options)
            runs[arm].append(run)
            stalls = " ".join(f"{stall:.3f}" for stall in run["stalls_s"])
            print(f"round {number + 1}, {arm}: {run['steps_s']:.1f} s, stalls {stalls}", flush=True)
    shutil.rmtree(folder)
    report(runs)


def one_run(folder: Path, options: list[str]) -> dict:
    """Train once and return seconds of the steps, stalls and the size of a checkpoint."""
    run_dir = folder / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "moeyard.training", str(folder / "run.yaml")]
    done = subprocess.run(
        [*command, f"run_dir={run_dir}", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    phases = {record["step"]: record["phases_s"] for record in read_metrics(run_dir)}
    stalls = [phases[step + 1]["checkpoint"] for step in range(EVERY, STEPS, EVERY)]
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    waits = [line for line in done.stderr.splitlines() if " waited " in line]
    shutil.rmtree(run_dir)
    return {
        "steps_s": sum(sum(phases[step].values()) for step in range(FIRST, STEPS + 1)),
        "stalls_s": stalls,
        "bytes": size,
        "waits": waits,
    }


def report(runs: dict[str, list[dict]]) -> None:
    """Print and write the medians."""
    facts = environment()
    print(f"$ {facts['command']}")
    print(f"({facts['cores']} cores, {facts['cpu']}; commit {facts['commit']})")
    size = runs["training waits"][0]["bytes"]
    saves = len(range(EVERY, STEPS, EVERY))
    print(f"checkpoint of {size / 1e9:.2f} GB, {saves} saves a run, medians:")
    steps_s = {arm: statistics.median(run["steps_s"] for run in runs[arm]) for arm in runs}
    rows = {}
    for arm in list(ARMS)[1:]:
        stalls = [stall for run in runs[arm] for stall in run["stalls_s"]]
        rows[arm] = {
            "stall_s": statistics.median(stalls),
            "smallest_s": min(stalls),
            "largest_s": max(stalls),
            "cost_s": (steps_s[arm] - steps_s["no saves"]) / saves,
            "waits": sum(len(run["waits"]) for run in runs[arm]),
        }
        row = rows[arm]
        print(
            f"{arm:15} stall {row['stall_s']:.3f} s ({row['smallest_s']:.3f} to "
            f"{row['largest_s']:.3f}), cost {row['cost_s']:.2f} s a save"
        )
    ratio = rows["asynchronous"]["stall_s"] / rows["training waits"]["stall_s"]
    print(f"stall of an asynchronous save: {100 * ratio:.1f} % of one that training waits for")
    print(f"one step without saves: {steps_s['no saves'] / (STEPS - FIRST + 1):.3f} s")
    write_results("async_saves", {"runs": runs, "medians": rows, "ratio": ratio})


if __name__ == "__main__":
    main()
