"""What does it save that a sampler knows the next timestep's experts?

    python benchmarks/next_timestep.py [--rates 50 100] [--budgets 10%] [--side 56]

A super-resolution model with one expert for each tenth of time (random weights, 8 layers, 10
experts of 1.6 MB each) enlarges an image in 20 steps of DDIM, so that every second step needs other
experts in all layers. Four ways take turns: all experts in memory; experts read when a layer needs
them; when a step begins, as the router knows them then; and while the step before still computes,
as the sampler tells the store. 10 % is one slot for each layer; the expert that was used longest
ago leaves. The disk is simulated: reads come from the page cache, with pauses that limit all
threads together to the given rate. Images must be the same.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from paced_disk import PacedDisk

from moeyard.moe.config.super_resolution import SuperResolutionConfig
from moeyard.moe.folders.families.native import NATIVE
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.folders.writer import write_model_folder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.super_resolution import SuperResolution
from moeyard.moe.models.upscaler import Upscaler
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.store import ExpertStore
from moeyard.serving.loading import open_kind

from report import write_results

STEPS, ROUNDS = 20, 3
MODEL = {
    "d_model": 256,
    "num_layers": 8,
    "num_heads": 4,
    "image_size": 32,
    "patch": 4,
    "residual_std": 0.2,
    "moe": {"num_experts": 10, "d_expert": 512, "router": {"kind": "timestep"}},
}
NAMES = (
    *("hits", "misses", "prefetch_useful", "prefetch_late", "prefetch_wasted"),
    *("bytes_read", "stall_s"),
)


class Weights:
    """The weights of a model in memory, for the writer of folders."""

    def __init__(self, model: SuperResolution) -> None:
        self._tensors = model.state_dict()

    def dense(self, parameter: str) -> torch.Tensor:
        return self._tensors[parameter]

    def expert_part(self, layer: int, expert: int, part: str) -> torch.Tensor:
        name = f"layers.{layer}.mlp.experts.{'fc2' if part == 'down' else 'fc1'}"
        tensor = self._tensors[name][expert]
        return tensor if part == "down" else tensor.chunk(2)[("gate", "up").index(part)]


def write_model(folder: Path) -> None:
    """Write a model of random weights, of which none is zero."""
    model = SuperResolution(SuperResolutionConfig(**MODEL))
    initialize(model, 0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    plans = plan_weights(model.config, NATIVE, Weights(model), torch.float32, torch.float32)
    write_model_folder(folder, to_hf(model.config, "float32"), plans, lambda _: None, {})


def totals(store: ExpertStore) -> dict[str, float]:
    layers = store.statistics.layers.values()
    return {name: sum(getattr(layer, name) for layer in layers) for name in NAMES}


def enlarge(upscaler: Upscaler, image: np.ndarray) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    found = upscaler(image, steps=STEPS)
    return time.perf_counter() - started, found


def compare(folder: Path, budget: str, rate: float, image: np.ndarray, disk: PacedDisk) -> dict:
    """Measure all ways at one rate."""
    resident, _ = open_kind(folder, ("super_resolution",))
    ways, options = {}, StoreOptions(policy="lru")  # what is best without announcements
    for name in ("on demand", "at the step", "a step ahead"):
        how = {"expert_memory": budget, "options": options}
        ways[name] = open_kind(folder, ("super_resolution",), **how)
        ways[name][0].announces_next = name == "a step ahead"
    for _, layer in ways["on demand"][0].model.moe_layers():
        layer.experts.announce = lambda routing: None
    seconds: dict[str, list[float]] = {"resident": [], **{name: [] for name in ways}}
    traffic: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    _, expected = enlarge(resident, image)
    for turn in range(ROUNDS + 1):
        for name, (upscaler, store) in ways.items():
            disk.bytes_per_s = rate * 1e6
            before = totals(store)
            elapsed, found = enlarge(upscaler, image)
            disk.bytes_per_s = None
            assert np.array_equal(found, expected), f"{name} gave another image"
            if turn:
                seconds[name].append(elapsed)
                after = totals(store)
                traffic[name].append({key: after[key] - before[key] for key in after})
        elapsed, _ = enlarge(resident, image)
        if turn:
            seconds["resident"].append(elapsed)
    for _, store in ways.values():
        store.close()
    rows: dict[str, dict] = {}
    for name, values in seconds.items():
        rows[name] = {"seconds": statistics.median(values)}
        if name in traffic:
            rows[name] |= {
                key: statistics.median(one[key] for one in traffic[name]) for key in NAMES
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[50, 100], help="MB/s")
    parser.add_argument("--budgets", nargs="+", default=["10%"])
    parser.add_argument("--side", type=int, default=56, help="of the large image, in pixels")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random = np.random.Generator(np.random.PCG64(0))
    small = arguments.side // 4
    image = random.integers(0, 256, (small, small, 3), dtype=np.uint8)
    disk, table = PacedDisk(), []
    print("budget  MB/s  way           seconds  stall s  MB read   ready  on the way  missing")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        for budget in arguments.budgets:
            for rate in arguments.rates:
                rows = compare(Path(folder) / "model", budget, rate, image, disk)
                table.append({"budget": budget, "rate_mb_s": rate, "ways": rows})
                for name, row in rows.items():
                    line = f"{budget:>6} {rate:5.0f}  {name:12} {row['seconds']:8.2f}"
                    if "hits" in row:
                        line += f" {row['stall_s']:8.2f} {row['bytes_read'] / 1e6:8.0f}"
                        line += f" {row['hits']:7.0f} {row['prefetch_late']:11.0f}"
                        line += f" {row['misses']:8.0f}"
                    print(line, flush=True)
    path = write_results(
        "next_timestep",
        {
            "question": "sampling with experts of times on disk, read on demand or a step ahead",
            "model": MODEL,
            "steps": STEPS,
            "side": arguments.side,
            "threads": arguments.threads,
            "table": table,
        },
    )
    print(f"written to {path}; all images were the resident model's")


if __name__ == "__main__":
    main()
