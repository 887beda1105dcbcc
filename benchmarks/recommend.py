"""Do experts recommend better than a dense model of equal active size, and does alignment help?

    python benchmarks/recommend.py [--work DIR] [--steps 400] [--rounds 3] [--seeds 3] [--jobs 2]

OneRec (Deng et al. 2025) generates sessions of items with an encoder-decoder whose feed-forward
layers are experts, and aligns it in rounds of DPO with what a reward model prefers. Here users,
items and what users think of sessions are known (click_log.py). The table has recall and loss of
held-out sessions for experts and a dense model with the same active weights, and then the true
reward of the likeliest session, round by round: with preferences, and with the same number of steps
on the log alone. Three seeds, paired: the same batches in all arms. Interrupt and start again as
you like.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import yaml

import moeyard
from moeyard.training.checkpoints.export import export_newest

from click_log import World
from report import write_results
from runs import read_metrics, train

WORLD = World(users=2000, items=600, sessions=12)
CODES, LEVELS = 16, 3
POSITIVE_S = 10
JUDGED = 256
"""Held-out users whose likeliest session gets its true reward."""
ARMS = {
    "experts": {
        "moe": {
            "num_experts": 8,
            "d_expert": 64,
            "activation": "relu",
            "router": {"kind": "topk", "k": 2, "balance_loss": 0.01},
        }
    },
    "dense": {"d_ff": 128},
}
MODEL = {
    "kind": "encoder_decoder",
    "d_model": 64,
    "num_layers": 4,
    "source_layers": 2,
    "num_heads": 4,
    "max_positions": 128,
}
ALIGNED = {"preferences": 30.0, "log alone": 0.0}
"""Weight of the preference loss in the rounds' runs."""
ROUND = ["train.steps=40", "optimizer.lr=5e-4", "optimizer.warmup_steps=5"]
SAMPLING = ["--share", "0.05", "--beams", "32"]


def write_data(work: Path) -> None:
    """Write the log and the semantic ids, once: a resumed run must find the same files."""
    if not (work / "clicks" / "world.json").exists():
        WORLD.write(work / "clicks")
    if not (work / "items").exists():
        sizes = ["--levels", str(LEVELS), "--codes", str(CODES)]
        moeyard_command(
            "items", str(work / "clicks" / "embeddings.npz"), str(work / "items"), *sizes
        )


def moeyard_command(*arguments: str) -> None:
    """Run a command as a user would, with one thread."""
    command = [sys.executable, "-m", "moeyard.cli", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def write_config(arm: str, work: Path, steps: int) -> Path:
    """Write the configuration of an arm."""
    values = {
        "run_dir": str(work / "run"),
        "model": MODEL | ARMS[arm],
        "data": {
            "format": "sessions",
            "source": str(work / "clicks" / "log.csv"),
            "items": str(work / "items"),
            "session_items": 5,
            "session_watch_s": 40,
            "positive_watch_s": POSITIVE_S,
            "recall_at": 10,
        },
        "train": {
            "steps": steps,
            "sequence_length": 60,
            "batch_sequences": 32,
            "log_every": 50,
            "eval_sequences": 256,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 40},
        "checkpoint": {"every": 200, "keep": 1},
    }
    path = work / f"{arm}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_seed(seed: int, steps: int, rounds: int, work: Path) -> dict:
    """Train both models of a seed and align the one with experts; continue what is there."""
    found = {}
    for arm in ARMS:
        run_dir = work / f"{arm}-seed{seed}"
        config = write_config(arm, work, steps)
        last = train(config, run_dir, [f"seed={seed}"], steps, 1, measure="eval_recall")[-1]
        found[arm] = [measures(run_dir, last, work)]
        print(f"{run_dir.name}: {found[arm][0]}", flush=True)
    for arm, weight in ALIGNED.items():
        target = work / f"{arm.replace(' ', '-')}-seed{seed}"
        how = [*SAMPLING, "--rounds", str(rounds), *ROUND, f"data.alignment.weight={weight}"]
        moeyard_command("align", str(work / f"experts-seed{seed}"), str(target), *how)
        runs = [target / f"round-{number}" / "run" for number in range(1, rounds + 1)]
        found[arm] = [measures(run, read_metrics(run)[-1], work) for run in runs]
        print(f"{target.name}: {found[arm]}", flush=True)
    return found


def measures(run_dir: Path, last: dict, work: Path) -> dict[str, float]:
    """Return loss and recall of a run, and what users think of the sessions it recommends."""
    path = run_dir / "reward.json"
    if not path.exists():
        path.write_text(json.dumps(true_reward(run_dir, work)))
    figures = {name: last[f"eval_{name}"] for name in ("loss", "recall")}
    return figures | {"reward": json.loads(path.read_text())}


def true_reward(run_dir: Path, work: Path) -> float:
    """Return the mean true reward of the likeliest session of some users, for their whole log."""
    model = moeyard.load_recommender(export_newest(run_dir))
    liked = histories()
    users = [user for user in sorted(liked) if len(liked[user]) >= 5][:JUDGED]
    with torch.inference_mode():
        sessions = model([liked[user] for user in users], k=5)
    rewards = [
        WORLD.reward(user, np.array([int(item[1:]) for item in session.items]))
        for user, session in zip(users, sessions, strict=True)
    ]
    return statistics.mean(rewards)


@functools.cache
def histories() -> dict[int, list[str]]:
    """Return what each user liked or watched, as the runs see it."""
    liked: dict[int, list[str]] = {}
    for user, _, item, seconds, is_liked in WORLD.events():
        if round(seconds, 2) >= POSITIVE_S or is_liked:
            liked.setdefault(int(user[1:]), []).append(item)
    return liked


def summary(runs: list[dict]) -> dict[str, dict]:
    """Return mean and spread of every figure, and the differences of pairs of a seed."""
    rows = {}
    for arm in (*ARMS, *ALIGNED):
        for number in range(len(runs[0][arm])):
            name = arm if arm in ARMS else f"{arm}, round {number + 1}"
            own = [run[arm][number] for run in runs]
            start = [run["experts"][0] for run in runs]
            rows[name] = {figure: [one[figure] for one in own] for figure in own[0]}
            rows[name] |= {
                f"{figure}_minus_experts": spread(
                    [one[figure] - first[figure] for one, first in zip(own, start, strict=True)]
                )
                for figure in own[0]
            }
    return rows


def spread(values: list[float]) -> list[float]:
    """Return mean and standard deviation."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def show(rows: dict[str, dict]) -> None:
    """Print the table: means, and differences from the run with experts in pairs of a seed."""
    heads = [f"{head:28}" for head in ("loss", "recall@10", "true reward")]
    print(f"\n{'':22}  {'   '.join(heads)}")
    for name, row in rows.items():
        cells = []
        for figure in ("loss", "recall", "reward"):
            mean, deviation = row[f"{figure}_minus_experts"]
            cells.append(f"{statistics.mean(row[figure]):.4f}  {mean:+.4f} +- {deviation:.4f}")
        print(f"{name:22}  {'   '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/recommend-benchmark"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, one thread each")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write_data(arguments.work)
    sizes = (arguments.steps, arguments.rounds, arguments.work)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda seed: run_seed(seed, *sizes), range(arguments.seeds)))
    rows = summary(runs)
    show(rows)
    path = write_results(
        "recommend",
        {
            "question": "experts against dense, and alignment, in generative recommendation",
            "steps": arguments.steps,
            "model": MODEL,
            "arms": ARMS,
            "alignment": {"weights": ALIGNED, "round": ROUND, "sampling": SAMPLING},
            "rows": rows,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
