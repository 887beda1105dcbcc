"""A training step against Hugging Face's Qwen3-MoE: same shape, types, optimizer and allocator.

    torchrun --standalone --nproc-per-node 2 benchmarks/train_step.py [--precision fp32|bf16]
    python benchmarks/train_step.py --no-communication

E=32 K=4 D=512 F=256 L=6, 1024 tokens a rank, vocabulary 4096. Both models live in the same
processes and take turns; medians and the median of the pairwise ratios are printed. Theirs is
Qwen3MoeForCausalLM with ``experts_implementation="grouped_mm"`` under DDP (gloo), its balance loss
on, gradients clipped, fused AdamW on the same decay groups; in bf16 both update fp32 masters. Ours
is ``TrainStep`` itself, with everything a run does in a step, at EP=1 and at EP=ranks. The phases
of our steps are those of ``metrics.jsonl``; ``--profile`` adds a step of each by operator.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.routers.topk import TopK
from moeyard.parallel.mesh import Mesh, build_mesh
from moeyard.parallel.process import process_group
from moeyard.training.config import ParallelConfig, RunConfig, TrainConfig
from moeyard.training.data.batches import GlobalBatches
from moeyard.training.data.shards import ShardFacts, TokenShard
from moeyard.training.data.text import TextData
from moeyard.training.objectives.next_token import NextTokenObjective
from moeyard.training.optimizers.adamw import AdamWConfig
from moeyard.training.parallelize import parallelize
from moeyard.training.run.allocator import keep_freed_memory
from moeyard.training.setup import build_model
from moeyard.training.step import TrainStep

from report import write_results

VOCABULARY, TOKENS = 4096, 1024
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    d_model=512,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    max_positions=TOKENS,
    moe=MoEConfig(num_experts=32, d_expert=256, router=TopK(k=4)),
)


def random_shard(folder: Path) -> TokenShard:
    ids = np.random.Generator(np.random.PCG64(0)).integers(0, VOCABULARY, 200 * TOKENS + 1)
    path = folder / "tokens.bin"
    ids.astype("<u2").tofile(path)
    facts = ShardFacts("uint16", len(ids), len(ids), VOCABULARY, 0, "", "", "")
    return TokenShard(path, facts)


class OurStep:
    """Runs our step ``s`` and keeps the seconds of its phases."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self.phases: list[dict[str, float]] = []

    def __call__(self, index: int) -> None:
        self._step.phases.start()
        self._step.run(index, stop_requested=False)
        self.phases.append(dict(self._step.phases.seconds))

    def median_phases(self) -> dict[str, float]:
        """Return the median of each phase that takes any time, without the first two steps."""
        names = [name for name, seconds in self.phases[-1].items() if seconds > 0]
        return {n: statistics.median(phase[n] for phase in self.phases[2:]) for n in names}


def our_step(mesh: Mesh, ep: int, precision: str, shard: TokenShard) -> OurStep:
    """Build our step on its own model."""
    config = RunConfig(
        run_dir="unused",
        model=MODEL,
        train=TrainConfig(
            steps=10_000,
            sequence_length=TOKENS,
            batch_sequences=mesh.world_size,
            precision=precision,
        ),
        optimizer=AdamWConfig(lr=1e-4),
        parallel=ParallelConfig(ep=ep),
    )
    batches = GlobalBatches(shard, TOKENS, mesh.world_size, seed=0)
    data = TextData(None, batches, "", None, "", None, batches, 1.0)  # type: ignore[arg-type]
    decoder = build_model(config, MODEL, data, mesh)
    objective = NextTokenObjective(config, data)
    loss, rows = objective.module(decoder), objective.mean_rows
    parallel = parallelize(config, decoder, loss, mesh, rows)
    return OurStep(TrainStep(config, decoder, objective, parallel, mesh))


def their_step(mesh: Mesh, precision: str, shard: TokenShard) -> Callable[[int], object]:
    """Return a function that runs Hugging Face's step ``s``."""
    moe = MODEL.moe
    assert moe is not None
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=MODEL.d_model,
        intermediate_size=MODEL.d_model,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.kv_heads,
        head_dim=MODEL.head_width,
        max_position_embeddings=TOKENS,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.router.k,
        moe_intermediate_size=moe.d_expert,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01 / moe.router.k,
        output_router_logits=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    masters = [p.detach().clone() for p in model.parameters()]
    if precision == "bf16":
        model.bfloat16()
    else:
        masters = [p.data for p in model.parameters()]
    parameters = list(model.parameters())
    decayed = [
        n.endswith("proj.weight") or (p.ndim > 1 and "embed" not in n)
        for n, p in model.named_parameters()
    ]
    groups = [
        {"params": [m for m, d in zip(masters, decayed, strict=True) if d], "weight_decay": 0.1},
        {"params": [m for m, d in zip(masters, decayed, strict=True) if not d], "weight_decay": 0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    run = (
        model
        if mesh.dp_group is None
        else DistributedDataParallel(model, gradient_as_bucket_view=True)
    )
    batches = GlobalBatches(shard, TOKENS, mesh.world_size, seed=0)

    def step(index: int) -> None:
        ids = batches.sequences(index, range(mesh.rank, mesh.rank + 1))[:, :-1]
        run(input_ids=ids, labels=ids).loss.backward()
        for parameter, master in zip(parameters, masters, strict=True):
            master.grad = parameter.grad.to(master.dtype)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        adam.step()
        model.zero_grad(set_to_none=mesh.dp_group is None)
        if precision == "bf16":
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.data.copy_(master)

    return step


def timed(step: Callable[[int], object], index: int) -> float:
    """Return the seconds of one step, until the slowest rank is done."""
    if dist.is_initialized():
        dist.barrier()
    started = time.perf_counter()
    step(index)
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-communication", action="store_true", help="one process, EP=1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="one step by operator")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder, process_group(300) as watch:
        shard = random_shard(Path(folder))
        mesh = build_mesh(1, 32, watch)
        contestants = {
            "hugging face": lambda: their_step(mesh, arguments.precision, shard),
            "moeyard ep=1": lambda: our_step(mesh, 1, arguments.precision, shard),
        }
        if mesh.world_size > 1:
            wide = build_mesh(mesh.world_size, 32, watch)
            contestants[f"moeyard ep={mesh.world_size}"] = lambda: our_step(
                wide, mesh.world_size, arguments.precision, shard
            )
        steps = {name: build() for name, build in contestants.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for index in range(arguments.rounds + 2):
            for name, step in steps.items():
                elapsed = timed(step, index)
                if index >= 2:  # the first fill caches and Adam's state
                    seconds[name].append(elapsed)
        if mesh.rank == 0:
            report(steps, seconds, arguments, mesh.world_size)
        if arguments.profile:
            for name, step in steps.items():
                profile(name, step, arguments.rounds + 2, is_shown=mesh.rank == 0)


def report(
    steps: dict[str, Callable[[int], object]],
    seconds: dict[str, list[float]],
    arguments: argparse.Namespace,
    ranks: int,
) -> None:
    print(f"{ranks} rank(s), {torch.get_num_threads()} thread(s) each, {arguments.precision}")
    theirs = seconds["hugging face"]
    figures: dict[str, dict] = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = statistics.median(t / v for t, v in zip(theirs, values, strict=True))
        figures[name] = {"median_s": median, "speed_up": ratio, "seconds": values}
        line = f"{name:14} {median:7.3f} s  {ranks * TOKENS / median:8.0f} tokens/s  {ratio:5.2f}x"
        step = steps[name]
        if isinstance(step, OurStep):
            phases = figures[name]["phases_s"] = step.median_phases()
            line += "   " + "  ".join(f"{phase} {value:.3f}" for phase, value in phases.items())
        print(line)
    name = f"train_step_{arguments.precision}_{ranks}rank"
    print("written to", write_results(name, {"contestants": figures}))


def profile(name: str, step: Callable[[int], object], index: int, is_shown: bool) -> None:
    """Run one step under torch.profiler and print where its time goes."""
    with torch.profiler.profile() as found:
        timed(step, index)
    if not is_shown:
        return
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{name}: {total / 1e6:.3f} s under the profiler")
    for event in events[:12]:
        print(f"  {event.self_cpu_time_total / 1e6:6.3f} s  {event.count:5} x  {event.key}")


if __name__ == "__main__":
    main()
