"""Which tiles are fastest on this GPU: every kernel of the expert MLP over candidates, one layer.

    python benchmarks/tiles.py --processes 16      # benchmarks/gpu.sh runs it, too

Several processes that share Triton's cache compile the candidates first. Each must give the results
of the shipped tiles. Then one process times them in turns; figures are medians with L2 overwritten
before each call. ``kernels/gpu/tiles.py`` has the chosen tiles. Each kernel has a floor: for many
rows cuBLAS on a dense product of the same FLOPs, for few rows the memory's speed.

T tokens, R routed rows, E experts, D model width, F expert width; M, N, P as in ``Tiles``.
"""

import argparse
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from expert_mlp import FLUSH_BYTES, LAYERS, MAX_ERROR, _seconds
from expert_mlp_problem import Layer
from torch import Tensor
from triton.runtime.errors import OutOfResources

from moeyard.kernels.gpu.grad_hidden import grad_hidden
from moeyard.kernels.gpu.grouped_matmul import grouped_matmul
from moeyard.kernels.gpu.grouping import group_rows
from moeyard.kernels.gpu.quantized_matmul import quantized_matmul
from moeyard.kernels.gpu.quantized_up import quantized_up_projection
from moeyard.kernels.gpu.tiles import Kernel, Tiles, quantized_tiles, tile_rows, tiles_for
from moeyard.kernels.gpu.up_projection import up_projection
from moeyard.kernels.gpu.weight_grad import weight_grad
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.quantize import quantize_experts

from report import write_results

ROUNDS = 15
DTYPE = torch.bfloat16
INT4_GROUP = 64
KIND: dict[str, Kernel] = {
    "up": "up",
    "fc2": "matmul",
    "grad x": "matmul",
    "grad hidden": "grad_hidden",
    "grad fc1": "weight_grad",
    "grad fc2": "weight_grad",
    "grad fc1, adds": "weight_sum",
    "grad fc2, adds": "weight_sum",
    "up, inference": "up",
    "up int8": "up",
    "fc2 int8": "matmul",
    "up int4": "up",
    "fc2 int4": "matmul",
}
"""What each launch is in ``tiles_for``."""
WEIGHTS = ("weight_grad", "weight_sum")
WIDE = ("up", "fc2", "grad x", "grad hidden")
WIDE += ("grad fc1", "grad fc2", "grad fc1, adds", "grad fc2, adds")
FEW = ("up, inference", "fc2", "up int8", "fc2 int8", "up int4", "fc2 int4")
"""Which launches are measured where experts have many rows, and few."""


def _with_stages(*sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [(*size, stages) for size, all_stages in sizes for stages in all_stages]


WIDE_ROWS = [
    Tiles(*values)
    for values in _with_stages(
        ((128, 256, 64, 8), (3, 4)),
        ((128, 256, 32, 8), (4, 6)),
        ((128, 128, 64, 8), (3, 4, 5)),
        ((128, 128, 64, 4), (3, 4)),
        ((128, 128, 128, 8), (2, 3)),
        ((64, 256, 64, 4), (3, 4)),
        ((64, 256, 64, 8), (3, 4)),
        ((64, 128, 64, 4), (3, 5)),
        ((64, 128, 128, 4), (3,)),
    )
]
SUMS = [
    Tiles(*values)
    for values in _with_stages(
        ((128, 256, 64, 8), (3, 5, 7)),
        ((128, 256, 32, 8), (5, 7)),
        ((128, 128, 64, 8), (3, 5)),
        ((128, 128, 64, 4), (3,)),
        ((256, 128, 64, 8), (5, 7)),
    )
]
FEW_ROWS = _with_stages(
    ((32, 256, 4), (4,)),
    ((64, 128, 4), (3, 5)),
    ((64, 256, 4), (2, 3, 4)),
    ((128, 64, 4), (4, 6)),
    ((128, 128, 4), (2, 3, 4, 5)),
    ((128, 256, 4), (2, 3)),
    ((128, 256, 8), (2, 3)),
    ((256, 64, 4), (4,)),
    ((256, 128, 8), (3,)),
)
FEW_ROWS_INT4 = _with_stages(
    ((32, 64, 2), (6,)),
    ((64, 64, 4), (4, 6)),
    ((128, 64, 2), (4, 6)),
    ((128, 64, 4), (3, 4, 6, 8)),
    ((256, 64, 8), (4,)),
)
"""Tiles without their rows. Steps of int4 are within a group."""


class Candidate(NamedTuple):
    """A kernel of the expert MLP with its tiles."""

    kernel: str
    tokens: int
    tiles: Tiles

    @property
    def name(self) -> str:
        """A line's head in the table."""
        m, n, p, warps, stages = self.tiles
        return f"{m:3} x {n:3} x {p:3}, {warps} warps, {stages} stages"


def candidates_of(layer: Layer, kernel: str, tokens: int) -> Iterator[Candidate]:
    """Yield the shipped tiles first, then the others."""
    rows = tile_rows(tokens * layer.num_choices, layer.num_experts)
    bits = kernel.partition("int")[2]
    if bits:
        shipped = quantized_tiles(rows, DTYPE, layer.d_model if bits == "8" else INT4_GROUP)
    else:
        shipped = tiles_for(KIND[kernel], rows, DTYPE, True)
    others = SUMS if KIND[kernel] in WEIGHTS else WIDE_ROWS
    if rows < 128 and KIND[kernel] not in WEIGHTS:
        few = FEW_ROWS_INT4 if bits == "4" else FEW_ROWS
        others = [Tiles(rows, *columns) for columns in few]
    for tiles in dict.fromkeys((shipped, *others)):
        yield Candidate(kernel, tokens, tiles)


class Problem:
    """The kernels' inputs for some tokens of a layer, made as the model makes them."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        experts, _, d_model, d_expert = layer
        draw = functools.partial(torch.randn, device="cuda", dtype=DTYPE)
        self.fc1_EHD = draw(experts, 2 * d_expert, d_model) * d_model**-0.5
        self.fc2_EDF = draw(experts, d_model, d_expert) * d_expert**-0.5
        self.grad1_EHD, self.grad2_EDF = (torch.empty_like(w) for w in (self.fc1_EHD, self.fc2_EDF))
        self.sum1_EHD, self.sum2_EDF = (
            torch.zeros_like(w, dtype=torch.float32) for w in (self.fc1_EHD, self.fc2_EDF)
        )

    @functools.cached_property
    def quantized(self) -> dict[str, Any]:
        """The same experts in 8 and 4 bits."""
        plain = ExpertWeights(self.fc1_EHD, self.fc2_EDF)
        return {"8": quantize_experts(plain, 8), "4": quantize_experts(plain, 4)}

    @functools.lru_cache(maxsize=2)  # noqa: B019  (one problem lives as long as the process)
    def rows(self, tokens: int) -> dict[str, Tensor]:
        """Return activations of some tokens."""
        torch.manual_seed(tokens)
        draw = functools.partial(torch.randn, device="cuda", dtype=DTYPE)
        layer, rows = self.layer, tokens * self.layer.num_choices
        scores_TE = torch.randn(tokens, layer.num_experts, device="cuda")
        return {
            "experts_TK": scores_TE.topk(layer.num_choices).indices,
            "weights_TK": torch.rand(tokens, layer.num_choices, device="cuda"),
            "x_TD": draw(tokens, layer.d_model),
            "h_RH": draw(rows, 2 * layer.d_expert),
            "a_RF": draw(rows, layer.d_expert),
        }

    def call(self, candidate: Candidate) -> Callable[[], Any]:
        """Return what runs the candidate's kernel once and returns what it wrote."""
        kernel, tokens, tiles = candidate
        made = self.rows(tokens)
        x_TD, h_RH, a_RF = made["x_TD"], made["h_RH"], made["a_RF"]
        rows = tile_rows(a_RF.shape[0], self.layer.num_experts)
        rows = rows if KIND[kernel] in WEIGHTS else tiles.M
        groups = group_rows(made["experts_TK"], None, self.layer.num_experts, rows)
        tail = ("ieee", tiles)

        def up(keeps_h: bool) -> Tensor:
            out_RF, kept_RH = torch.empty_like(a_RF), torch.empty_like(h_RH) if keeps_h else None
            up_projection(x_TD, groups, self.fc1_EHD, None, "swiglu", *tail, out_RF, kept_RH)
            return out_RF

        def few_bits_up(bits: str) -> Tensor:
            out_RF, fc1 = torch.empty_like(a_RF), self.quantized[bits].fc1
            quantized_up_projection(x_TD, groups, fc1, None, "swiglu", *tail, out_RF)
            return out_RF

        def few_bits_down(bits: str) -> Tensor:
            return quantized_matmul(a_RF, self.quantized[bits].fc2, None, groups, *tail)

        def hidden() -> Tensor:
            first = (made["weights_TK"], h_RH, self.fc2_EDF, None, "swiglu")
            return grad_hidden(x_TD, groups, *first, *tail)[0]

        def total(left_XQ: Tensor, right_XP: Tensor, out_EQP: Tensor, by_token: bool) -> Tensor:
            adds = out_EQP.dtype == torch.float32
            how = {"num_choices": self.layer.num_choices, "add": adds}
            factors = (left_XQ, right_XP, groups, out_EQP)
            weight_grad(*factors, *tail, left_is_by_token=by_token, **how)
            return out_EQP

        launches: dict[str, Callable[[], Tensor]] = {
            "up": lambda: up(True),
            "up, inference": lambda: up(False),
            "fc2": lambda: grouped_matmul(a_RF, self.fc2_EDF.mT, None, groups, *tail),
            "grad x": lambda: grouped_matmul(h_RH, self.fc1_EHD, None, groups, *tail),
            "grad hidden": hidden,
            "grad fc1": lambda: total(h_RH, x_TD, self.grad1_EHD, False),
            "grad fc2": lambda: total(x_TD, a_RF, self.grad2_EDF, True),
            "grad fc1, adds": lambda: total(h_RH, x_TD, self.sum1_EHD, False),
            "grad fc2, adds": lambda: total(x_TD, a_RF, self.sum2_EDF, True),
            "up int8": lambda: few_bits_up("8"),
            "fc2 int8": lambda: few_bits_down("8"),
            "up int4": lambda: few_bits_up("4"),
            "fc2 int4": lambda: few_bits_down("4"),
        }
        return launches[kernel]

    def outcome_of(self, call: Callable[[], Tensor]) -> Tensor:
        """Run a call once on outputs full of NaN, so that missing writes are visible."""
        for total in (self.sum1_EHD, self.sum2_EDF):
            total.zero_()
        for gradient in (self.grad1_EHD, self.grad2_EDF):
            gradient.fill_(torch.nan)
        # torch then also fills new memory with NaN.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return call().to(torch.float32, copy=True)
        finally:
            torch.use_deterministic_algorithms(False)

    def flops(self, kernel: str, tokens: int) -> int:
        """Return what a kernel computes."""
        rows = tokens * self.layer.num_choices
        product = 2 * rows * self.layer.d_model * self.layer.d_expert
        return product * (2 if kernel.startswith(("up", "grad x", "grad fc1")) else 1)


def compile_some(layer: Layer, candidates: list[Candidate]) -> None:
    """Compile in a separate process; failures show up again, and are reported, when timed."""
    problem = Problem(layer)
    for candidate in candidates:
        try:
            problem.call(candidate)()
            torch.cuda.synchronize()
        except (OutOfResources, RuntimeError) as error:
            print(f"{candidate.kernel}, {candidate.name}: {str(error).splitlines()[0]}", flush=True)


def time_kernel(
    problem: Problem, candidates: list[Candidate], flush: Tensor, stop: float
) -> list[dict[str, Any]]:
    """Time one kernel's candidates in turns, the shipped tiles among them."""
    found: list[dict[str, Any]] = []
    calls: list[Callable[[], Any]] = []
    expected = None
    for candidate in candidates:
        line: dict[str, Any] = {"tiles": list(candidate.tiles), "name": candidate.name}
        found.append(line)
        if time.monotonic() > stop:
            line["problem"] = "no time was left"
            continue
        try:
            call = problem.call(candidate)
            outcome = problem.outcome_of(call)
            expected = outcome if expected is None else expected
            line["error"] = float((outcome - expected).abs().max() / expected.abs().max())
            if not line["error"] <= MAX_ERROR:
                line["problem"] = f"is off by {line['error']:.0e} from the shipped tiles"
                continue
            calls.append(call)
            line["seconds"] = []
        except (OutOfResources, RuntimeError) as error:
            line["problem"] = str(error).splitlines()[0]
    timed = [line for line in found if "seconds" in line]
    for _ in range(ROUNDS):
        for line, call in zip(timed, calls, strict=True):
            flush.zero_()
            line["seconds"].append(_seconds(call, True))
        if time.monotonic() > stop:
            break
    for line in timed:
        line["seconds"] = median(line["seconds"])
    return found


def floors() -> dict[str, float]:
    """Return this GPU's speeds: a large product's in FLOP/s and a large copy's in bytes/s."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    wide = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    out = torch.empty_like(wide)
    for _ in range(3):
        left @ right
        out.copy_(wide)
    product = median(_seconds(lambda: left @ right, True) for _ in range(10))
    copy = median(_seconds(lambda: out.copy_(wide), True) for _ in range(10))
    return {"flops": 2 * 8192**3 / product, "bytes": 2 * wide.numel() / copy}


def main() -> None:
    """Compile all candidates, then time them and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = ["Qwen3-30B-A3B"]
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=usual)
    parser.add_argument("--tokens", nargs="+", type=int, default=(8192, 16))
    parser.add_argument("--kernels", nargs="+", choices=KIND, default=list(KIND))
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--budget-s", type=float, default=150)
    arguments = parser.parse_args()
    stop = time.monotonic() + arguments.budget_s
    context = multiprocessing.get_context("spawn")
    cells: list[dict[str, Any]] = []
    plan: dict[tuple[str, int, str], list[Candidate]] = {}
    for name, tokens in itertools.product(arguments.layers, arguments.tokens):
        layer = LAYERS[name]
        is_few = tile_rows(tokens * layer.num_choices, layer.num_experts) < 64
        for kernel in (k for k in (FEW if is_few else WIDE) if k in arguments.kernels):
            plan[name, tokens, kernel] = list(candidates_of(layer, kernel, tokens))
    gpu = {"gpu": torch.cuda.get_device_name(), **floors()}
    print(f"{gpu['gpu']}: {gpu['flops'] / 1e12:.0f} TFLOP/s, {gpu['bytes'] / 1e12:.2f} TB/s")
    # Each process holds a layer, its gradients and their sums.
    num_processes = max(1, min(arguments.processes, torch.cuda.mem_get_info()[0] >> 33))
    for name in arguments.layers:
        everything = [c for key, some in plan.items() if key[0] == name for c in some]
        shares = [everything[i::num_processes] for i in range(num_processes)]
        processes = [
            context.Process(target=compile_some, args=(LAYERS[name], share)) for share in shares
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(1.0, stop - time.monotonic() - 20))
            process.kill()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    problem, opened = None, None
    for number, ((name, tokens, kernel), some) in enumerate(plan.items()):
        if opened != name:
            problem, opened = Problem(LAYERS[name]), name
        assert problem is not None
        until = time.monotonic() + max(0.0, stop - time.monotonic()) / (len(plan) - number)
        lines = time_kernel(problem, some, flush, until)
        flops = problem.flops(kernel, tokens)
        cells.append({"layer": name, "tokens": tokens, "kernel": kernel, "flops": flops})
        cells[-1]["candidates"] = lines
        print(f"{name}, T={tokens}, {kernel}")
        ranked = sorted((line for line in lines if "problem" not in line), key=_speed)
        shipped = lines[0].get("seconds")
        for line in ranked[:4] + [line for line in ranked[4:] if line is lines[0]]:
            rate = flops / line["seconds"] / 1e12
            ratio = f"{shipped / line['seconds']:.2f}x the shipped" if shipped else "none shipped"
            print(
                f"  {line['name']}  {line['seconds'] * 1e6:8.1f} us  {rate:6.1f} TFLOP/s  {ratio}"
            )
        worst = max((line["error"] for line in ranked), default=0.0)
        failed = len(lines) - len(ranked)
        print(f"  {len(ranked)} timed, {failed} failed, largest difference {worst:.0e}", flush=True)
        write_results("tiles_cuda", gpu | {"cells": cells})


def _speed(line: dict[str, Any]) -> float:
    return line["seconds"]


if __name__ == "__main__":
    main()
