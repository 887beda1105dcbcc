"""Measure the choices in the CPU kernels.

    python benchmarks/cpu_kernels.py

1. kernels/cpu/src/products.h: products of few bf16 rows with weights that come from memory, and how
   fast those are read, with and without huge pages (kernels/values/memory.py), against F.linear.
2. kernels/cpu/training.py: the experts forward and backward, against torch's products, with a new
   routing in every round as in training, in GFLOP/s.
3. kernels/torch_ops/causal_attention.py: blocks of 64 and 128 queries next to F.sdpa, forward and
   backward.

All take turns; figures are medians. Weights of 1 are read in turn from 400 MB, so that none stay in
a cache.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moeyard.kernels.cpu.library import load
from moeyard.kernels.cpu.linear import linear
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.torch_ops import causal_attention
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.kernels.values.memory import prefer_huge_pages
from moeyard.training.run.allocator import keep_freed_memory

from report import write_results

ROUNDS = 15


def medians(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Run each way in turn and return its median in seconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def show(rows: list[dict]) -> list[dict]:
    for row in rows:
        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(cells), flush=True)
    return rows


@torch.no_grad()
def few_rows(outputs: int = 1920, width: int = 768) -> list[dict]:
    """Return GB/s of weights for some numbers of rows."""
    num_bytes = 2 * outputs * width
    count = 400_000_000 // num_bytes
    plain = torch.empty(count, outputs, width, dtype=torch.bfloat16).normal_()
    huge = torch.empty_like(plain)
    prefer_huge_pages(huge)
    huge.copy_(plain)
    rows = []
    for num_rows in (1, 2, 4, 8, 16):
        x = torch.randn(num_rows, width).bfloat16()

        def over(weights, function, x=x):
            return lambda: [function(x, weight) for weight in weights]

        ways = {"plain": over(plain, linear), "huge": over(huge, linear)}
        found = medians(ways | {"F.linear": over(huge, F.linear)})
        rates = {f"{name} GB/s": count * num_bytes / s / 1e9 for name, s in found.items()}
        rows.append({"threads": torch.get_num_threads(), "rows": num_rows, **rates})
    return show(rows)


def experts(tokens: int = 1024, choices: int = 4, num_experts: int = 32) -> list[dict]:
    """Return GFLOP/s of forward and of backward, at train_step.py's shape."""
    d_model, d_expert, rows = 512, 256, []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, d_model).to(dtype).requires_grad_()
        weights = torch.rand(tokens, choices).requires_grad_()
        fc1 = (torch.randn(num_experts, 2 * d_expert, d_model) * d_model**-0.5).to(dtype)
        fc2 = (torch.randn(num_experts, d_model, d_expert) * d_expert**-0.5).to(dtype)
        fc1.requires_grad_(), fc2.requires_grad_()
        sums = MainGrads(torch.empty(fc1.shape), torch.empty(fc2.shape), is_empty=True)
        state: dict[str, torch.Tensor] = {}

        def forward(backend, x=x, weights=weights, fc1=fc1, fc2=fc2, sums=sums, state=state):
            ids = torch.rand(tokens, num_experts).topk(choices).indices
            state["y"] = expert_mlp(
                x, ids, weights, ExpertWeights(fc1, fc2, main_grads=sums), backend
            )

        def backward(x=x, sums=sums, state=state):
            sums.is_empty = True
            state["y"].backward(torch.ones_like(x))

        ways = {}
        for backend in ("cpp", "torch"):
            ways[f"{backend} forward"] = lambda backend=backend: forward(backend)
            ways[f"{backend} backward"] = backward
        flops = 6 * tokens * choices * d_model * d_expert
        rates = {
            f"{name} GFLOP/s": flops * (2 if "backward" in name else 1) / seconds / 1e9
            for name, seconds in medians(ways).items()
        }
        rows.append({"dtype": str(dtype).removeprefix("torch."), **rates})
    return show(rows)


def attention(length: int = 1024, heads: int = 8, kv_heads: int = 4, width: int = 64) -> list[dict]:
    """Return the ms of forward and backward."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        shapes = [(1, length, n, width) for n in (heads, kv_heads, kv_heads)]
        q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)

        def by_blocks(block, q=q, k=k, v=v):
            causal_attention.BLOCK = block
            out = causal_attention.CausalAttention.apply(q, k, v)
            torch.autograd.grad(out.sum(), (q, k, v))

        def sdpa(q=q, k=k, v=v):
            args = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out.sum(), (q, k, v))

        blocks = {f"blocks of {n}": lambda n=n: by_blocks(n) for n in (64, 128)}
        found = medians(blocks | {"F.sdpa": sdpa})
        times = {f"{name} ms": 1e3 * s for name, s in found.items()}
        rows.append({"dtype": str(dtype).removeprefix("torch."), **times})
    return show(rows)


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    figures = {"instruction_set": load().state, "few_rows": few_rows()}
    torch.set_num_threads(1)
    print("one thread")
    figures |= {"experts": experts(), "attention": attention()}
    print(f"written to {write_results('cpu_kernels', figures)}")


if __name__ == "__main__":
    main()
