"""What do a routed FFN (SPT) and random slices (Split & Merge) cost and gain in fine-tuning?

    python benchmarks/cut_mlps.py BASE_TEXT TEXT [--work DIR] [--steps 300] [--fine-tune-steps 200]

A small dense model is trained on BASE_TEXT and exported. Then it is tuned on TEXT: as it is, with
its MLPs cut into slices that a router chooses, and with slices drawn at random, merged again at
the end. Three seeds, the same batches for all arms of a seed. Time and kept bytes are of one
forward and backward of an MLP (256 x 1024) for 8 x 256 tokens on one thread; arms take turns.
Interrupt and start again as you like.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from moeyard.moe.folders.merge import merge
from moeyard.moe.folders.upcycle import upcycle
from moeyard.moe.gated_mlp import GatedMLP
from moeyard.moe.layer import MoELayer
from moeyard.moe.routers.stochastic import Stochastic
from moeyard.moe.routers.topk import TopK

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "shakespeare.yaml"
SEEDS = (0, 1, 2)
D_FF = 512
SIZES = ["train.eval_sequences=256", "train.eval_every=100000", "checkpoint.every=100000"]
DENSE = ["model.moe=null", f"model.d_ff={D_FF}"]
ARMS: dict[str, tuple[str, int, int]] = {
    "routed FFN, 2 of 4": ("routed_ffn", 4, 2),
    "routed FFN, 1 of 4": ("routed_ffn", 4, 1),
    "random slices, 2 of 4, merged": ("stochastic", 4, 2),
}
"""Router, slices and slices of a token."""
ROUNDS = 15


def run_seed(seed: int, given: argparse.Namespace) -> dict[str, float]:
    """Return the held-out loss of every arm, from one dense model."""
    work = given.work / f"seed{seed}"
    common = [*SIZES, f"seed={seed}", "optimizer.warmup_steps=20"]
    base = [*common, *DENSE, f"data.source={given.base_text}"]
    train(CONFIG, work / "base", base, given.steps, threads=1)
    dense = work / "dense"
    if not dense.exists():
        command = [sys.executable, "-m", "moeyard.cli", "export", str(work / "base"), str(dense)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tuned = [*common, "model=null", f"data.source={given.text}", "optimizer.lr=5e-4"]
    losses = {"dense": _tune(work, "dense", dense, tuned, given.fine_tune_steps)}
    for arm, (router, slices, k) in ARMS.items():
        folder = work / f"{router}-{slices}-{k}"
        if not folder.exists():
            upcycle(dense, folder, slices, k, router=router, seed=seed)
        losses[arm] = _tune(work, f"tuned-{folder.name}", folder, tuned, given.fine_tune_steps)
        if router == "stochastic":
            losses[arm] = _merged_loss(work, f"tuned-{folder.name}", tuned)
        print(f"seed {seed}, {arm}: {losses[arm]:.4f}", flush=True)
    return losses


def _tune(work: Path, name: str, folder: Path, options: list[str], steps: int) -> float:
    records = train(CONFIG, work / f"run-{name}", [*options, f"start_from={folder}"], steps, 1)
    return float(records[-1]["eval_loss_per_byte"])


def _merged_loss(work: Path, name: str, options: list[str]) -> float:
    """Export a run, merge its slices, and return the merged model's loss on the same windows."""
    exported, merged = work / f"export-{name}", work / f"merged-{name}"
    if not exported.exists():
        source = str(work / f"run-{name}")
        command = [sys.executable, "-m", "moeyard.cli", "export", source, str(exported)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if not merged.exists():
        merge(exported, merged)
    still = ["optimizer.lr=1e-30", "optimizer.weight_decay=0"]
    return _tune(work, f"merged-{name}", merged, [*options, *still], 1)


def costs() -> dict[str, dict[str, float]]:
    """Return the time and the kept bytes of one MLP's forward and backward, by arm."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    d_model, width, rows = 256, 1024, 2048
    layers: dict[str, nn.Module] = {"dense": GatedMLP(d_model, width)}
    for arm, (router, slices, k) in ARMS.items():
        spt = TopK(k=k, score="sigmoid", renormalize=False, scale=2.0, balance_loss=0.0)
        config = spt if router == "routed_ffn" else Stochastic(k=k, drawn_per="sequence")
        layers[arm] = MoELayer(d_model, width // slices, slices, config)
    x_BTD = torch.randn(8, rows // 8, d_model)
    seconds: dict[str, list[float]] = {arm: [] for arm in layers}
    for _ in range(ROUNDS):
        for arm, layer in layers.items():
            seconds[arm].append(_step(layer, x_BTD))
    return {
        arm: {"ms": 1e3 * statistics.median(seconds[arm]), "kept_mib": _kept(layer, x_BTD)}
        for arm, layer in layers.items()
    }


def _run(layer: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
    y = layer(x_BTD)
    return y[0] if isinstance(y, tuple) else y


def _step(layer: nn.Module, x_BTD: torch.Tensor) -> float:
    x_BTD = x_BTD.clone().requires_grad_(True)
    began = time.perf_counter()
    _run(layer, x_BTD).sum().backward()
    return time.perf_counter() - began


def _kept(layer: nn.Module, x_BTD: torch.Tensor) -> float:
    """Return what backward keeps next to parameters and input, in MiB."""
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = _run(layer, x_BTD.clone().requires_grad_(True))
    del y
    return sum(sizes.values()) / (1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_text", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/cut-mlps"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--fine-tune-steps", type=int, default=200)
    given = parser.parse_args()
    given.work = given.work.absolute()
    found = [run_seed(seed, given) for seed in SEEDS]
    spent = costs()
    lines = [f"{'':30} {'loss':>7} {'minus dense':>19} {'ms':>7} {'kept MiB':>9}"]
    rows = {}
    for arm in found[0]:
        losses = [losses[arm] for losses in found]
        gaps = [losses[arm] - losses["dense"] for losses in found]
        rows[arm] = {"losses": losses, "minus_dense": gaps} | spent[arm]
        gap = f"{statistics.mean(gaps):+.4f} +- {statistics.stdev(gaps):.4f}"
        lines.append(
            f"{arm:30} {statistics.mean(losses):7.4f} {gap:>19} {spent[arm]['ms']:7.1f} "
            f"{spent[arm]['kept_mib']:9.1f}"
        )
    print("\n".join(lines))
    path = write_results("cut_mlps", {"arms": rows, "steps": [given.steps, given.fine_tune_steps]})
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
