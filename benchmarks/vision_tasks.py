"""Do gates of tasks help a vision model with several tasks? And what does switching tasks cost?

    python benchmarks/vision_tasks.py [--work DIR] [--steps 800] [--seeds 3] [--jobs 1] [--digits]

M3ViT (Liang et al. 2022) reports that a vision transformer with experts in every other block and a
gate for each task is better than single-task models, and than one gate for all tasks; and that two
experts in memory are enough, so that switching tasks costs nothing.

Images of scripts/draw_shapes.py have three tasks: the nearest shape, the class of each pixel, and
depth. Every model sees the same images in the same order, with the active parameters of the dense
one: 4 experts of a quarter of its MLP's width. Delta is M3ViT's: the mean over tasks of the
relative gain over the dense model that was trained on this task alone, paired by seed. With
--digits the images are scikit-learn's handwritten digits under noise; the tasks are the digit, and
the picture without noise. Interrupt and start again as you like.
"""

import argparse
import importlib.util
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml
from vision_switch import measure_switch

from report import write_results
from runs import train

SCRIPT = Path(__file__).parent.parent / "scripts" / "draw_shapes.py"
IMAGES, HELD_OUT = 8000, 500
BODY = {"kind": "vit", "d_model": 48, "num_layers": 4, "num_heads": 4, "d_ff": 192}
EXPERTS = {"num_experts": 16, "d_expert": 48, "activation": "gelu", "expert_bias": True}
SHAPES = {
    "image_size": [16, 16],
    "patch_size": 4,
    "channels": 3,
    "tasks": [
        {"name": "nearest", "kind": "classes"},
        {"name": "parts", "kind": "pixel_classes", "classes": 6},
        {"name": "depth", "kind": "pixel_values", "loss_weight": 10},
    ],
}
DIGITS = {
    "image_size": [8, 8],
    "patch_size": 2,
    "channels": 1,
    "tasks": [
        {"name": "digit", "kind": "classes"},
        {"name": "clean", "kind": "pixel_values", "loss_weight": 10},
    ],
}
MEASURES = {
    "nearest": ("eval_accuracy_nearest", 1),
    "parts": ("eval_miou_parts", 1),
    "depth": ("eval_rmse_depth", -1),
    "digit": ("eval_accuracy_digit", 1),
    "clean": ("eval_rmse_clean", -1),
}
"""Of each task: its measure, and -1 where less is better."""


def arms(num_tasks: int) -> dict[str, dict | None]:
    """Return the MoE layers of each model with several tasks; None = dense."""
    task = {"kind": "task", "k": 4, "num_tasks": num_tasks}
    shared = {"kind": "topk", "k": 4, "renormalize": False}
    return {
        "gates": {**EXPERTS, "router": task},
        "vector": {**EXPERTS, "router": {**task, "form": "vector"}},
        "shared": {**EXPERTS, "router": shared},
        "dense": None,
    }


def shapes() -> tuple[dict, dict]:
    """Return training and held-out images of shapes."""
    spec = importlib.util.spec_from_file_location("draw_shapes", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.draw_many(IMAGES, 16, seed=1), script.draw_many(HELD_OUT, 16, seed=2)


def digits() -> tuple[dict, dict]:
    """Return scikit-learn's digits under noise; every fifth is held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("error: --digits needs scikit-learn; pip install scikit-learn.")
    found = load_digits()
    clean = (found.images / 16).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.4, clean.shape)
    images = (clean + noise).clip(0, 1).astype(np.float32)
    held_out = np.arange(len(clean)) % 5 == 0
    return tuple(
        {"images": images[chosen], "digit": found.target[chosen], "clean": clean[chosen]}
        for chosen in (~held_out, held_out)
    )


def run_one(name: str, model: dict, seed: int, steps: int, work: Path) -> dict:
    """Train one model, or continue an earlier run, and return its last record."""
    config = work / f"{name}.yaml"
    values = {
        "run_dir": str(work / "run"),
        "model": model,
        "data": {
            "format": "images",
            "source": str(work / "train.npz"),
            "eval_source": str(work / "held-out.npz"),
        },
        "train": {"steps": steps, "batch_sequences": 16, "log_every": 100, "eval_sequences": 500},
        "optimizer": {"lr": 2e-3, "warmup_steps": 50},
        "checkpoint": {"every": steps, "keep": 1},
    }
    config.write_text(yaml.safe_dump(values))
    run_dir = work / f"{name}-seed{seed}"
    record = train(config, run_dir, [f"seed={seed}"], steps, threads=1, measure="eval_loss")[-1]
    shown = {key: round(value, 4) for key, value in record.items() if key.startswith("eval_")}
    print(f"{run_dir.name}: {shown}", flush=True)
    return record


def summary(arm: str, tasks: list[str], seeds: range, records: dict) -> dict:
    """Return an arm's measures by task, and Delta over single-task models of the same seed."""
    measures, gains = {}, []
    for task in tasks:
        measures[task] = [records[arm, seed][MEASURES[task][0]] for seed in seeds]
    for seed in seeds:
        relative = []
        for task in tasks:
            name, sign = MEASURES[task]
            alone = records[f"single-{task}", seed][name]
            relative.append(sign * (records[arm, seed][name] - alone) / alone)
        gains.append(100 * statistics.mean(relative))
    loads = [load["max_over_mean"] for s in seeds for load in records[arm, s].get("load", [])]
    return {
        "measures": measures,
        "delta_percent": gains,
        "delta_mean": statistics.mean(gains),
        "delta_stdev": statistics.stdev(gains) if len(gains) > 1 else None,
        "busiest_over_mean": max(loads, default=None),
    }


def show(rows: dict[str, dict], alone: dict[str, list[float]]) -> None:
    """Print the table."""
    print("\narm      " + "".join(f"{MEASURES[task][0]:>26}" for task in alone) + "   Delta, %")
    means = "".join(f"{statistics.mean(values):26.4f}" for values in alone.values())
    print(f"single   {means}   0")
    for arm, row in rows.items():
        means = "".join(f"{statistics.mean(values):26.4f}" for values in row["measures"].values())
        spread = "" if row["delta_stdev"] is None else f" +- {row['delta_stdev']:.2f}"
        each = " ".join(f"{value:+.2f}" for value in row["delta_percent"])
        print(f"{arm:9}{means}   {row['delta_mean']:+.2f}{spread}  ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/vision-tasks"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits")
    arguments = parser.parse_args()
    work, data = arguments.work, DIGITS if arguments.digits else SHAPES
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "train.npz").exists():  # a resumed run must find the same file
        parts = digits() if arguments.digits else shapes()
        for name, arrays in zip(("held-out", "train"), reversed(parts), strict=True):
            np.savez(work / f"{name}.npz", **arrays)
    body = {**BODY, **data}
    models = {arm: {**body, "moe": moe} for arm, moe in arms(len(data["tasks"])).items()}
    for task in data["tasks"]:
        models[f"single-{task['name']}"] = {**body, "tasks": [task]}
    seeds, tasks = range(arguments.seeds), [task["name"] for task in data["tasks"]]
    grid = [(name, seed) for seed in seeds for name in models]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(
            lambda cell: run_one(cell[0], models[cell[0]], cell[1], arguments.steps, work), grid
        )
        records = dict(zip(grid, found, strict=True))
    rows = {arm: summary(arm, tasks, seeds, records) for arm in arms(len(tasks))}
    alone = {
        task: [records[f"single-{task}", seed][MEASURES[task][0]] for seed in seeds]
        for task in tasks
    }
    show(rows, alone)
    switch = measure_switch(work, tasks)
    path = write_results(
        "vision_tasks_digits" if arguments.digits else "vision_tasks",
        {
            "question": "Delta of gates of tasks over single-task models; bytes and time of tasks",
            "steps": arguments.steps,
            "models": models,
            "single": alone,
            "arms": rows,
            "switch": switch,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
