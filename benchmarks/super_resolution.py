"""Do experts by timestep, and sampling-space experts, make diffusion super-resolution better?

    python benchmarks/super_resolution.py [--work DIR] [--steps 1500] [--jobs 2] [--seeds 3]

SS-MoE (Luo et al. 2023) says that both improve images at no greater cost of inference. Here a small
model enlarges drawn images four times. All arms have the same active width in every layer, the same
batches, timesteps and noise. Held-out images are drawn from another seed. Each is enlarged from
four noises: PSNR and SSIM are the means over all of them; "mean of 4" measures the mean image of
the four. Bilinear and bicubic interpolation measure the same images. Three seeds, paired. Interrupt
and start again as you like.
"""

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml

import moeyard
from moeyard.moe.diffusion.images import from_bytes, larger, smaller
from moeyard.moe.diffusion.measures import psnr, ssim
from moeyard.training.checkpoints.export import export_newest

from report import write_results
from runs import train

DRAW = Path(__file__).parent.parent / "scripts" / "draw_images.py"
SIDE, SCALE = 32, 4
NOISES, SAMPLING_STEPS = 4, 10
WIDTH = 96
"""Of an expert, and of a dense MLP."""
MOE = {"num_experts": 4, "d_expert": WIDTH}
TIMESTEP, SPACE = {"kind": "timestep"}, {"kind": "sampling_space"}
NO_FILTER = "dense, no filter"
ARMS: dict[str, dict] = {
    "dense": {"d_ff": WIDTH},
    "time": {"moe": MOE | {"router": TIMESTEP}},
    "space": {"moe": MOE | {"router": SPACE}},
    "time and space": {"moe": MOE | {"router": TIMESTEP}, "space_layers": [1, 3]},
    NO_FILTER: {"d_ff": WIDTH, "frequency_bands": 0},
}
MODEL = {
    "kind": "super_resolution",
    "d_model": 48,
    "num_layers": 4,
    "num_heads": 4,
    "image_size": SIDE,
    "scale": SCALE,
    "patch": 4,
    "frequency_bands": 8,
}


def draw(work: Path, name: str, count: int, side: int, seed: int) -> Path:
    """Draw images once."""
    path = work / f"{name}.npz"
    if not path.exists():
        options = ["--count", str(count), "--side", str(side), "--seed", str(seed)]
        subprocess.run([sys.executable, str(DRAW), str(path), *options], check=True)
    return path


def write_config(arm: str, arguments: argparse.Namespace) -> Path:
    """Write the configuration of an arm."""
    work, steps = arguments.work, arguments.steps
    model = MODEL | ARMS[arm]
    ramp = {"exchange_steps": max(1, steps // 4)}  # the paper's grows over a tenth of a long run
    if "space_layers" in model:
        model["space"] = ramp
    elif arm == "space":
        model["moe"] = MOE | {"router": SPACE | ramp}
    values = {
        "run_dir": str(work / "run"),
        "model": model,
        "data": {
            "format": "super_resolution",
            "source": str(draw(work, "train", 1000, 48, 0)),
            "eval_source": str(draw(work, "held-out", 48, SIDE, 1)),
            "eval_images": 0,
        },
        "train": {
            "steps": steps,
            "batch_sequences": 12,
            "log_every": 25,
            "eval_sequences": 4096,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 40},
        "checkpoint": {"every": 10 * steps, "keep": 1},
    }
    path = work / f"{arm.replace(' ', '-').replace(',', '')}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def measure(found: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Return the means over images."""
    return {"psnr": float(psnr(found, right).mean()), "ssim": float(ssim(found, right).mean())}


def run_one(arm: str, seed: int, steps: int, work: Path, config: Path) -> dict:
    """Train one model, or continue an earlier run, and measure the images that it makes."""
    run_dir = work / f"{config.stem}-seed{seed}"
    records = train(config, run_dir, [f"seed={seed}"], steps, threads=1, measure="eval_loss")
    upscaler = moeyard.load_upscaler(export_newest(run_dir))
    right = from_bytes(np.load(work / "held-out.npz")["images"])
    guide = larger(smaller(right, SCALE), SCALE)
    each = [upscaler.enlarge(guide, SAMPLING_STEPS, noise) for noise in range(NOISES)]
    measures = [measure(images, right) for images in each]
    mean = measure(torch.stack(each).mean(dim=0), right)
    found = {
        "eval_loss": records[-1]["eval_loss"],
        "psnr": statistics.mean(one["psnr"] for one in measures),
        "ssim": statistics.mean(one["ssim"] for one in measures),
        "psnr_of_mean": mean["psnr"],
        "ssim_of_mean": mean["ssim"],
    }
    print(run_dir.name, {name: round(value, 4) for name, value in found.items()}, flush=True)
    return found


def summary(arm: str, seeds: range, cells: dict[tuple[str, int], dict]) -> dict:
    """Return an arm's figures, and its gains over dense in pairs of the same seed."""
    found = {}
    for name in next(iter(cells.values())):
        own = [cells[arm, seed][name] for seed in seeds]
        gains = [cells[arm, seed][name] - cells["dense", seed][name] for seed in seeds]
        found[name] = {
            "each": own,
            "mean": statistics.mean(own),
            "minus_dense_mean": statistics.mean(gains),
            "minus_dense_stdev": statistics.stdev(gains) if len(gains) > 1 else None,
        }
    return found


def interpolations(work: Path) -> dict[str, dict[str, float]]:
    """Return the measures of images that no model made."""
    right = from_bytes(np.load(work / "held-out.npz")["images"])
    small = smaller(right, SCALE)
    bilinear = F.interpolate(small, scale_factor=SCALE, mode="bilinear")
    return {"bilinear": measure(bilinear, right), "bicubic": measure(larger(small, SCALE), right)}


def show(rows: dict[str, dict], others: dict[str, dict[str, float]], steps: int) -> None:
    """Print the table."""
    print(f"\n48 held-out images of {SIDE} x {SIDE} pixels, enlarged {SCALE} times; {steps} steps")
    print("means over seeds; in brackets: minus dense, mean and stdev of pairs")
    print("arm               held-out loss              PSNR in dB                SSIM")
    for arm, row in rows.items():
        cells = [
            f"{row[name]['mean']:{form}} ({row[name]['minus_dense_mean']:+{form}} +- "
            f"{row[name]['minus_dense_stdev'] or 0:{form}})"
            for name, form in (("eval_loss", ".4f"), ("psnr", ".2f"), ("ssim", ".4f"))
        ]
        print(f"{arm:16}  {'  '.join(f'{cell:26}' for cell in cells)}")
    print("\nthe mean of 4 images                          PSNR in dB                SSIM")
    for arm, row in rows.items():
        cells = [
            f"{row[name]['mean']:{form}} ({row[name]['minus_dense_mean']:+{form}} +- "
            f"{row[name]['minus_dense_stdev'] or 0:{form}})"
            for name, form in (("psnr_of_mean", ".2f"), ("ssim_of_mean", ".4f"))
        ]
        print(f"{arm:16}  {'':26}  {'  '.join(f'{cell:26}' for cell in cells)}")
    for name, found in others.items():
        print(f"{name:16}  {'':26}  {found['psnr']:<26.2f}  {found['ssim']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/super-resolution"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    configs = {arm: write_config(arm, arguments) for arm in ARMS}
    seeds = range(arguments.seeds)
    grid = [(arm, seed) for seed in seeds for arm in ARMS if arm != NO_FILTER]
    grid += [(NO_FILTER, seed) for seed in seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(
            lambda cell: run_one(*cell, arguments.steps, arguments.work, configs[cell[0]]), grid
        )
        cells = dict(zip(grid, found, strict=True))
    rows = {arm: summary(arm, seeds, cells) for arm in ARMS}
    others = interpolations(arguments.work)
    show(rows, others, arguments.steps)
    path = write_results(
        "super_resolution",
        {
            "question": "super-resolution by experts of times and of the sampling space",
            "steps": arguments.steps,
            "model": MODEL,
            "arms": {arm: {"model": ARMS[arm], **row} for arm, row in rows.items()},
            "interpolation": others,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
