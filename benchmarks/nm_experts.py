"""What do 2:4 experts cost in loss, trained by SR-STE or pruned at the end? What do they save?

    python benchmarks/nm_experts.py loss [--text FILE] [--work DIR] [--steps 300] [--jobs 2]
    python benchmarks/nm_experts.py speed --model MODEL_DIR --prompt TEXT

Loss: dense experts, 2:4 experts by SR-STE, by the same without decay (STE), and the dense ones
pruned by magnitude after training; equal steps, batches and first weights. The decay is chosen by
a search on a seed that the comparison does not use. Interrupt and start again as you like.

Speed: one layer's experts alone, plain bf16 and packed. Then MODEL_DIR's experts, pruned to 2:4 by
magnitude and written in bf16 and packed, with a part of them in memory, in turn, one sequence at a
time. Results must be equal bit for bit.
"""

import argparse
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.n_of_m import keep_mask, masked
from moeyard.kernels.values.two_of_four import PATTERN, pack_experts
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.parallel.mesh import Mesh
from moeyard.serving.loading import open_model
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

from report import write_results
from runs import train

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "demo.yaml"
SIZES = [
    *("model.num_layers=2", "train.sequence_length=128", "train.batch_sequences=8"),
    *("parallel.ep=1", "checkpoint.every=200", "train.eval_sequences=256"),
]
SEARCH_SEED, SEEDS = 0, (1, 2, 3)
DECAYS = (2e-4, 2e-3, 2e-2, 2e-1)
AIM_NATS = 0.02
KERNEL_SIZES = ((32, 4, 256, 128), (8, 2, 2048, 1024))
"""Experts, choices, D and F."""
KERNEL_TOKENS = (1, 4, 64)


def run_one(seed: int, decay: float | None, arguments: argparse.Namespace) -> list[dict]:
    """Train one model, or continue an earlier run, and return its records; None = dense."""
    name = "dense" if decay is None else f"decay{decay:g}"
    run_dir = arguments.work / f"{name}-seed{seed}"
    overrides = [*SIZES, f"seed={seed}"]
    if arguments.text is not None:
        overrides.append(f"data.source={arguments.text}")
    if decay is not None:
        overrides.append(f"train.sparse_experts={{n: 2, m: 4, decay: {decay}}}")
    records = train(CONFIG, run_dir, overrides, arguments.steps, threads=1)
    print(f"{run_dir.name}: {records[-1]['eval_loss']:.4f} nats", flush=True)
    return records


def pruned_loss(run_dir: Path) -> float:
    """Return the held-out loss of a finished run with its experts pruned to 2:4 by magnitude."""
    torch.set_num_threads(1)
    trainer = Trainer(read_run_config(run_dir / "config.yaml", []), run_dir, Mesh())
    trainer.saves.resume()
    for _, layer in trainer.decoder.moe_layers():
        for weight in (layer.experts.fc1.data, layer.experts.fc2.data):
            weight.copy_(pruned(weight))
    return trainer.objective.evaluate(trainer._loss, Mesh()).metrics["eval_loss"]


def compare_losses(arguments: argparse.Namespace) -> None:
    """Search the decay, train all arms, and write what they lose."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        search = dict(
            zip(
                DECAYS,
                pool.map(lambda d: run_one(SEARCH_SEED, d, arguments), DECAYS),
                strict=True,
            )
        )
        best = min(DECAYS, key=lambda d: search[d][-1]["eval_loss"])
        arms = {"dense": None, "sr-ste": best, "ste": 0.0}
        grid = [(arm, seed) for arm in arms for seed in SEEDS]
        found = pool.map(lambda g: run_one(g[1], arms[g[0]], arguments), grid)
        records = dict(zip(grid, found, strict=True))
    losses = {cell: runs[-1]["eval_loss"] for cell, runs in records.items()}
    losses |= {("one-shot", s): pruned_loss(arguments.work / f"dense-seed{s}") for s in SEEDS}
    print(f"\nsearch on seed {SEARCH_SEED}: {[(d, search[d][-1]['eval_loss']) for d in DECAYS]}")
    print(f"nats per held-out token after {arguments.steps} steps, decay {best:g}")
    print(f"{'':10}" + "".join(f"  seed {s}" for s in SEEDS) + "    mean   minus dense (stdev)")
    rows = {}
    for arm in ("dense", "sr-ste", "ste", "one-shot"):
        own = [losses[arm, seed] for seed in SEEDS]
        gaps = [losses[arm, seed] - losses["dense", seed] for seed in SEEDS]
        mean, spread = statistics.mean(gaps), statistics.stdev(gaps)
        rows[arm] = {"losses": own, "minus_dense_mean": mean, "minus_dense_stdev": spread}
        shown = "".join(f"  {loss:.4f}" for loss in own)
        print(f"{arm:10}{shown}  {statistics.mean(own):.4f}   {mean:+.4f} +- {spread:.4f}")
    for arm in ("sr-ste", "ste"):
        flips = [share_of_flips(records[arm, seed]) for seed in SEEDS]
        rows[arm]["mask_flips"] = flips
        print(f"weights that joined or left forward in a step, {arm}: " + shown_flips(flips[0]))
    holds = rows["sr-ste"]["minus_dense_mean"] <= AIM_NATS
    print(f"within {AIM_NATS} nats of dense: {'yes' if holds else 'no'}")
    facts = {"steps": arguments.steps, "decay": best, "arms": rows, "holds": holds}
    facts["search"] = {f"{d:g}": search[d][-1]["eval_loss"] for d in DECAYS}
    print(f"written to {write_results('nm_experts_loss', facts)}")


def share_of_flips(records: list[dict]) -> list[tuple[int, int]]:
    """Return the steps that were logged, and the mask flips of each."""
    return [(record["step"], record["mask_flips"]) for record in records]


def shown_flips(flips: list[tuple[int, int]]) -> str:
    """Return a few of them for people."""
    shown = flips[:: max(1, len(flips) // 6)]
    return ", ".join(f"step {step}: {count}" for step, count in shown)


def compare_speeds(arguments: argparse.Namespace) -> None:
    """Time experts alone, then whole answers with a part of the experts in memory."""
    torch.set_num_threads(arguments.threads)
    kernels = [row for sizes in KERNEL_SIZES for row in kernel_times(*sizes, arguments.rounds)]
    answers = offloaded_answers(arguments) if arguments.model is not None else []
    facts = {"threads": arguments.threads, "kernels": kernels, "answers": answers}
    print(f"written to {write_results('nm_experts_speed', facts)}")


@torch.no_grad()
def kernel_times(experts: int, k: int, d_model: int, d_expert: int, rounds: int) -> list[dict]:
    """Return seconds of one layer's experts in bf16, plain and packed, in turn."""
    torch.manual_seed(0)
    shapes = ((experts, 2 * d_expert, d_model), (experts, d_model, d_expert))
    plain = ExpertWeights(*(pruned(torch.randn(s) * s[2] ** -0.5).bfloat16() for s in shapes))
    forms = {"bf16": plain, "2:4": pack_experts(plain)}
    found = []
    for tokens in KERNEL_TOKENS:
        x = torch.randn(tokens, d_model).bfloat16()
        batches = [torch.rand(tokens, experts).topk(k).indices for _ in range(8)]
        weights = torch.rand(tokens, k)
        times: dict[str, list[float]] = {name: [] for name in forms}
        for number in range(rounds):
            ids = batches[number % len(batches)]
            outputs = []
            for name, form in forms.items():
                began = time.perf_counter()
                outputs.append(expert_mlp(x, ids, weights, form))
                times[name].append(time.perf_counter() - began)
            assert torch.equal(*outputs)
        row = {"experts": experts, "k": k, "d_model": d_model, "d_expert": d_expert}
        row |= {"tokens": tokens}
        for name, own in times.items():
            row |= {f"{name} median_us": median(own) * 1e6, f"{name} fastest_us": min(own) * 1e6}
        found.append(row)
        shown = (f"{key} {value:.0f}" for key, value in row.items())
        print("  ".join(shown), flush=True)
    return found


def pruned(weight: torch.Tensor) -> torch.Tensor:
    return masked(weight, keep_mask(weight, PATTERN))


def offloaded_answers(arguments: argparse.Namespace) -> list[dict]:
    """Generate with a quarter of the experts, and with the memory that these take in bf16."""
    plain, packed = arguments.work / "pruned-bf16", arguments.work / "packed"
    if not packed.exists():
        write_pruned(arguments.model, plain)
        convert(plain, packed, "2:4")
    folder = ModelFolder(plain)
    config = folder.config
    folder.close()
    num_experts = len(config.moe_layers) * config.moe.num_experts
    quarter = num_experts // 4 * 3 * config.moe.d_expert * config.d_model * 2
    cases = {
        "bf16, 25 %": (plain, "25%"),
        "2:4, 25 %": (packed, "25%"),
        "2:4, memory of bf16's 25 %": (packed, f"{quarter}B"),
    }
    prompt = list(arguments.prompt.read_bytes()[:256])
    rates: dict[str, list[float]] = {name: [] for name in cases}
    rows, expected = {}, None
    for _ in range(arguments.repeats):
        for name, (path, memory) in cases.items():
            model, store = open_model(path, expert_memory=memory)
            began = time.perf_counter()
            ids = model.generate(torch.tensor([prompt]), arguments.tokens, temperature=0)
            seconds = time.perf_counter() - began
            rates[name].append(arguments.tokens / seconds)
            totals = store.statistics.totals()
            rows[name] = {"slots": store.num_slots, "slot_bytes": store.slot_bytes, **totals}
            store.close()
            expected = ids if expected is None else expected
            assert torch.equal(ids, expected), f"{name} answers otherwise"
    found = []
    for name, row in rows.items():
        row = {"case": name, "tokens_per_s": rates[name], "median": median(rates[name]), **row}
        found.append(row)
        print(
            f"{name:28} {row['median']:.1f} tokens/s (slowest {min(rates[name]):.1f}, fastest "
            f"{max(rates[name]):.1f}), {row['slots']} slots of {row['slot_bytes']} bytes, "
            f"{row['misses']} misses, {row['bytes_read'] / 1e6:.1f} MB read"
        )
    return found


def write_pruned(source: Path, target: Path) -> None:
    """Copy a model folder with its experts' matrices pruned to 2:4 by magnitude."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if ".experts." in name and name.endswith(".weight"):
                    tensors[name] = pruned(tensor.float()).to(tensor.dtype)
            save_file(tensors, target / path.name, {"format": "pt"})
        elif path.name != "expert_hashes.json":
            shutil.copy(path, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    loss = parts.add_parser("loss")
    loss.add_argument("--text", type=Path, help="default: the running Python's standard library")
    loss.add_argument("--work", type=Path, default=Path("runs/nm-experts"))
    loss.add_argument("--steps", type=int, default=300)
    loss.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    speed = parts.add_parser("speed")
    speed.add_argument("--model", type=Path, help="folder in bf16; None times experts alone")
    speed.add_argument("--prompt", type=Path, help="text whose first 256 bytes are the prompt")
    speed.add_argument("--work", type=Path, default=Path("runs/nm-experts"))
    speed.add_argument("--threads", type=int, default=2)
    speed.add_argument("--rounds", type=int, default=41)
    speed.add_argument("--repeats", type=int, default=5, help="answers of each case")
    speed.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    (compare_losses if arguments.part == "loss" else compare_speeds)(arguments)


if __name__ == "__main__":
    main()
