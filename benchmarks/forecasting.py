"""Is a small Time-MoE better on a series than linear forecasters, and than a dense model?

    python benchmarks/forecasting.py --data ETTh1.csv [--work DIR] [--steps 120] [--every 1]
        [--arms moe,dense] [--seeds 3] [--jobs 1]

Time-MoE (Shi et al. 2024) reports lower errors than earlier forecasters, after training on 300
billion points. Here models learn from the training months of the one file, so this asks something
smaller: whether the layer and the objective learn, and what experts add at equal active size.

The file has hours in lines: 12 months are for training, 4 for validation, 4 for the test. Errors
are of values in units of the training months' mean and deviation, over all channels and windows.
Models forecast every ``--every``-th window; linear forecasters are measured on these and on all.
Their look-back (96, 336 or 512) and penalty are the best on the validation months, for each
horizon. Three seeds, paired: the same windows in every arm. Interrupt and start again as you like.

N windows, C channels, H points ahead.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import yaml
from linear_forecasts import HORIZONS, MONTH, SPLITS, linear_rows, read_hourly, windows

from report import write_results
from runs import train

CONTEXT = 336
"""Points that the models read."""
HEADS = [1, 8, 24, 48]
"""All horizons are multiples of the last one, so that a long forecast begins with shorter ones."""
MODEL = {
    "kind": "time_moe",
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 64,
    "max_positions": CONTEXT + max(HORIZONS),
    "horizons": HEADS,
}
MOE = {
    "num_experts": 8,
    "d_expert": 16,
    "d_shared": 32,
    "shared_gate": True,
    "router": {
        "kind": "topk",
        "k": 2,
        "renormalize": False,
        "balance_loss": 0.04,
        "balance_over": "model",
    },
}
ARMS = {"moe": MODEL | {"moe": MOE}, "dense": MODEL}
"""A token's two experts and the shared one are as wide as the dense MLP."""
BATCH = 64
"""Series forecast together."""


def settings(source: Path, steps: int) -> dict:
    """Return the configuration of a run."""
    first, _, end = (SPLITS[split] for split in SPLITS)
    return {
        "run_dir": "unset",
        "model": MODEL,
        "data": {
            "format": "series",
            "source": str(source.resolve()),
            "split": [first[1] * MONTH, (end[0] - first[1]) * MONTH, (end[1] - end[0]) * MONTH],
            "context": CONTEXT,
            "horizon": HORIZONS[0],
        },
        "train": {
            "steps": steps,
            "sequence_length": CONTEXT + HEADS[-1],
            "batch_sequences": 16,
            "log_every": 20,
            "eval_sequences": 32,
        },
        "optimizer": {"lr": 3e-3, "warmup_steps": 20},
        "checkpoint": {"every": 100, "keep": 1},
    }


def run_one(
    arm: str, seed: int, arguments: argparse.Namespace, config: Path
) -> dict[str, dict[str, float]]:
    """Train one model, or continue an earlier run, and return its errors by horizon."""
    run_dir = arguments.work / f"{arm}-seed{seed}"
    overrides = [f"seed={seed}", f"model={json.dumps(ARMS[arm])}"]
    train(config, run_dir, overrides, arguments.steps, threads=1, measure="eval_mse")
    path = run_dir / f"errors-{arguments.steps}-{arguments.every}.json"
    if not path.exists():
        path.write_text(json.dumps(errors_of(run_dir, arguments.data, arguments.every)))
    found = json.loads(path.read_text())
    print(f"{run_dir.name}: MSE {found[str(HORIZONS[0])]['mse']:.4f}", flush=True)
    return found


def errors_of(run_dir: Path, source: Path, every: int) -> dict[str, dict[str, float]]:
    """Return MSE and MAE by horizon of a run's model, as a user asks it."""
    import moeyard
    from moeyard.training.checkpoints.export import export_newest

    torch.set_num_threads(1)
    forecaster = moeyard.load_forecaster(export_newest(run_dir))
    names = list(forecaster.trained_on.scales)
    scales = np.array([forecaster.trained_on.scales[name] for name in names])
    raw_TC = read_hourly(source)
    longest = max(HORIZONS)
    # The first windows of the shortest horizon are all windows; later ones lack longer truths.
    ahead_NCH = windows(raw_TC, "test", CONTEXT, HORIZONS[0])[::every]
    padded_TC = np.pad(raw_TC, ((0, longest), (0, 0)), constant_values=np.nan)
    end = SPLITS["test"][1] * MONTH
    padded_TC[end:] = np.nan
    start = SPLITS["test"][0] * MONTH
    found_NCH = np.empty((*ahead_NCH.shape[:2], longest))
    truth_NCH = np.empty_like(found_NCH)
    for row in range(len(ahead_NCH)):
        place = start + row * every
        truth_NCH[row] = padded_TC[place : place + longest].T
    series = ahead_NCH[:, :, :CONTEXT].reshape(-1, CONTEXT)
    columns = names * len(ahead_NCH)
    forecasts = forecaster(series, longest, context=CONTEXT, columns=columns, batch_series=BATCH)
    found_NCH[:] = np.stack([one.mean for one in forecasts]).reshape(found_NCH.shape)
    apart_NCH = (found_NCH - truth_NCH) / scales[:, 1][:, None]
    rows = {}
    for horizon in HORIZONS:
        within = apart_NCH[:, :, :horizon]
        within = within[~np.isnan(within).any(axis=(1, 2))]
        rows[str(horizon)] = {
            "mse": float((within**2).mean()),
            "mae": float(np.abs(within).mean()),
            "windows": len(within),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="hours in lines, as ETTh1.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/forecasting"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument(
        "--every", type=int, default=1, help="models forecast every so many windows"
    )
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    linear = linear_figures(arguments)
    config = arguments.work / "run.yaml"
    config.write_text(yaml.safe_dump(settings(arguments.data, arguments.steps)))
    arms, seeds = arguments.arms.split(",") if arguments.arms else [], range(arguments.seeds)
    grid = [(arm, seed) for seed in seeds for arm in arms]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda cell: run_one(*cell, arguments, config), grid)
        errors = dict(zip(grid, found, strict=True))
    models = {arm: summary([errors[arm, seed] for seed in seeds]) for arm in arms}
    show(linear, models)
    path = write_results(
        "forecasting",
        {
            "question": "errors of forecasts beside linear ones",
            "data": arguments.data.name,
            "steps": arguments.steps,
            "context": CONTEXT,
            "every": arguments.every,
            "model": ARMS,
            "linear": linear,
            "models": models,
        },
    )
    print(f"written to {path}")


def linear_figures(arguments: argparse.Namespace) -> dict:
    """Return the linear forecasters' errors, kept for the next start."""
    path = arguments.work / f"linear-{arguments.every}.json"
    if not path.exists():
        values_TC = read_hourly(arguments.data)
        rows = {str(h): linear_rows(values_TC, h, arguments.every) for h in HORIZONS}
        path.write_text(json.dumps(rows))
    return json.loads(path.read_text())


def summary(found: list[dict[str, dict[str, float]]]) -> dict:
    """Return means and spreads over seeds, by horizon."""
    rows = {}
    for horizon in map(str, HORIZONS):
        own = [one[horizon] for one in found]
        rows[horizon] = {"windows": own[0]["windows"]}
        for name in ("mse", "mae"):
            each = [one[name] for one in own]
            rows[horizon][name] = each
            rows[horizon][f"{name}_mean"] = statistics.mean(each)
            rows[horizon][f"{name}_stdev"] = statistics.stdev(each) if len(each) > 1 else None
    return rows


def show(linear: dict, models: dict) -> None:
    """Print the table."""
    print(
        "\nhorizon  forecaster   look-back  MSE                MAE                MSE, all windows"
    )
    for horizon in map(str, HORIZONS):
        for kind, row in linear[horizon].items():
            print(
                f"{horizon:>7}  {kind:12} {row['context']:8}   {row['mse']:.4f}             "
                f"{row['mae']:.4f}             {row['mse_all']:.4f}"
            )
        for arm, by_horizon in models.items():
            row = by_horizon[horizon]
            cells = [
                f"{row[f'{name}_mean']:.4f} +- {row[f'{name}_stdev'] or 0:.4f}"
                for name in ("mse", "mae")
            ]
            print(f"{horizon:>7}  {arm:12} {CONTEXT:8}   {'   '.join(cells)}")


if __name__ == "__main__":
    main()
