"""The expert MLP's speed and memory on a GPU, against peers and the dense floor, in one run.

    python benchmarks/expert_mlp.py --device cuda            # benchmarks/gpu.sh does more
    python benchmarks/expert_mlp.py --device cpu             # expert_mlp_cpu.py says what that is
    TRITON_INTERPRET=1 python benchmarks/expert_mlp.py --device cpu --layers tiny --tokens 1 9

The floor is cuBLAS on dense products of the same FLOPs: all routed rows through one expert. Every
contestant is first compared with the torch backend, then timed in turns; figures are medians, with
L2 overwritten before each call. T=8192 comes first and the results are written after every size,
so that a run that is cut short still has results.

T tokens, K choices, R = T*K routed rows, E experts, D model width, F expert width.
"""

import argparse
import gc
import itertools
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from expert_mlp_peers import PEERS
from expert_mlp_problem import Layer, Problem
from torch import Tensor

from moeyard.kernels.experts import Backend, expert_mlp
from moeyard.kernels.gpu import tiles as tile_rules
from moeyard.kernels.torch_ops.megablocks import why_not as why_no_megablocks
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.kernels.values.quantize import quantize_experts
from moeyard.kernels.values.quantized_weights import Bits, QuantizedExpertWeights

from report import write_results

LAYERS = {
    "Qwen3-30B-A3B": Layer(128, 8, 2048, 768),
    "OLMoE": Layer(64, 8, 2048, 1024),
    "Mixtral-8x7B": Layer(8, 2, 4096, 14336),
    "gpt-oss-20b": Layer(32, 4, 2880, 2880),
    "Qwen3-235B-A22B": Layer(128, 8, 4096, 1536),
    "DeepSeek-V3": Layer(256, 8, 7168, 2048),
    "tiny": Layer(4, 2, 64, 64),
}
MODES = ("forward", "forward and backward")
QUANTIZED_MODES: dict[str, Bits] = {"forward, int8": 8, "forward, int4": 4}
QUANTIZED_LAYERS = ("Qwen3-30B-A3B", "tiny")
QUANTIZED_TOKENS = (16, 1, 64, 8192, 2048, 4096)
"""Decoding, where weights in 8 and 4 bits should be faster, and a prompt, where they must not be
slower."""
TOKENS = (8192, 32768, 16, 1, 1024, 4096, 128, 64, 4)
"""Most important first."""
GRAPH_TOKENS = 256
"""Up to here launching takes longer than computing, so a replayed CUDA graph is timed too."""
MAX_ERROR = 5e-2
"""Largest error against the torch backend, both in bf16; contestants above it are not timed."""
PLAIN = "triton, bf16 weights"
UNCOMPARED = ("dense", PLAIN, f"{PLAIN}, graph")
"""Contestants that compute something else than "torch" does, by design."""
MAX_ROUNDS, MIN_ROUNDS = 40, 3
FLUSH_BYTES = 1 << 28
"""Four times the L2 of an H200."""


Contestants = dict[str, Callable[[], Any]]


def contestants_of(problem: Problem, has_backward: bool, is_cuda: bool) -> Contestants:
    """Return what is timed; our own come first, and "torch" is what the others must agree with."""
    parameters = (problem.fc1_EHD, problem.fc2_EDF)
    found: Contestants = {}

    def ours(backend: Backend) -> Callable[[], Any]:
        if has_backward:
            return lambda: problem.gradients(problem.run(backend), *parameters)
        return torch.no_grad()(lambda: problem.run(backend))

    found["torch"] = ours("torch")
    found["triton"] = ours("triton")
    if is_cuda and why_no_megablocks(problem.x_TD.device) is None:
        found["our glue on MegaBlocks"] = ours("megablocks")
    sum_bytes = sum(4 * p.numel() for p in parameters)
    # The gradients of two other contestants need memory too.
    has_room = not is_cuda or 2 * sum_bytes < torch.cuda.mem_get_info()[0]
    if has_backward:
        sums: list[MainGrads] = []

        def with_main_gradients() -> Any:
            if not sums:
                totals = (torch.zeros_like(p, dtype=torch.float32) for p in parameters)
                sums.append(MainGrads(*totals))
            return problem.gradients(problem.run("triton", sums[0]))

        if has_room:
            found["triton, fp32 main gradients"] = with_main_gradients
        found["triton, fc1 again"] = lambda: problem.gradients(
            problem.run("triton", recompute=True), *parameters
        )
    elif is_cuda and problem.x_TD.shape[0] <= GRAPH_TOKENS:
        found["triton, graph"] = _graph_of(ours("triton"))
    found["dense"] = problem.dense(has_backward)
    for name, build in PEERS.items():
        found[name] = build(problem, has_backward)
    return found


def quantized_contestants_of(
    problem: Problem, experts: QuantizedExpertWeights, is_cuda: bool
) -> Contestants:
    """Return the contestants on weights in 8 or 4 bits, and those on plain weights."""

    @torch.no_grad()
    def ours(backend: Backend) -> Tensor:
        return expert_mlp(problem.x_TD, problem.experts_TK, problem.weights_TK, experts, backend)

    found: Contestants = {
        "torch": lambda: ours("torch"),
        "triton": lambda: ours("triton"),
        PLAIN: torch.no_grad()(lambda: problem.run("triton")),
    }
    if problem.num_rows > experts.num_experts * tile_rules.QUANTIZED_ROWS:
        for name, rows in (("written out", 0), ("on their way", problem.num_rows)):
            found[f"triton, widened {name}"] = _widened(lambda: ours("triton"), rows)
    if is_cuda and problem.x_TD.shape[0] <= GRAPH_TOKENS:
        found |= {f"{name}, graph": _graph_of(found[name]) for name in ("triton", PLAIN)}
    return found


def _widened(function: Callable[[], Any], rows_per_expert: int) -> Callable[[], Any]:
    """Return a function that dequantizes weights from this many rows per expert on."""

    def widened() -> Any:
        usual = tile_rules.DEQUANTIZE_ROWS_PER_EXPERT
        tile_rules.DEQUANTIZE_ROWS_PER_EXPERT = rows_per_expert
        try:
            return function()
        finally:
            tile_rules.DEQUANTIZE_ROWS_PER_EXPERT = usual

    return widened


def _graph_of(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that captures another one when first called, and then replays it."""
    kept: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def replay() -> Tensor:
        if not kept:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = function()
            kept.append((graph, y))
        kept[0][0].replay()
        return kept[0][1]

    return replay


def measure(contestants: Contestants, is_cuda: bool, budget_s: float) -> dict[str, dict[str, Any]]:
    """Check, warm up and time every contestant; record a sentence if one has no figures."""
    figures: dict[str, dict[str, Any]] = {}
    expected: list[Tensor] = []
    for name, function in contestants.items():
        try:
            figures[name] = _first_call(name, function, expected, is_cuda)
        except Exception as error:  # a peer that is missing or too large is a line of the table
            line = str(error).splitlines()[0].partition(". ")[0]
            figures[name] = {"problem": f"{type(error).__name__}: {line}"}
    expected.clear()
    timed = {name: contestants[name] for name in figures if "problem" not in figures[name]}
    times: dict[str, list[float]] = {name: [] for name in timed}
    flush = torch.empty(FLUSH_BYTES if is_cuda else 1, dtype=torch.uint8)
    flush = flush.cuda() if is_cuda else flush
    stop = time.monotonic() + budget_s
    for number in itertools.count():
        if number >= MAX_ROUNDS or (number >= MIN_ROUNDS and time.monotonic() > stop):
            break
        for name, function in list(timed.items()):
            flush.zero_()
            try:
                times[name].append(_seconds(function, is_cuda))
            except torch.OutOfMemoryError:
                figures[name]["problem"] = "out of memory next to the others"
                del timed[name]
    for name in timed:
        figures[name] |= {"seconds": median(times[name]), "rounds": len(times[name])}
    return figures


def _first_call(
    name: str, function: Callable[[], Any], expected: list[Tensor], is_cuda: bool
) -> dict[str, Any]:
    """Compile, compare with the torch backend's result, and take the peak memory."""
    if is_cuda:
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found = function()
    figures: dict[str, Any] = {}
    if is_cuda:
        torch.cuda.synchronize()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    if name in UNCOMPARED:
        return figures
    outputs = [found] if isinstance(found, Tensor) else list(found)
    # Only the last experts' weight gradients: all of them twice do not fit with the largest layer.
    outputs = [part if part.ndim < 3 else part[-2:].clone() for part in outputs]
    del found
    if not expected:
        expected += outputs
        return figures
    # Peers have other weight layouts, so only the gradient of x is compared for all.
    pairs = zip(outputs[: len(expected)], expected, strict=False)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    figures["error"] = max(errors)
    if not figures["error"] <= MAX_ERROR:
        raise ValueError(f"is off by {figures['error']:.1e} from the torch backend")
    return figures


def _seconds(function: Callable[[], Any], is_cuda: bool) -> float:
    if not is_cuda:
        start_s = time.perf_counter()
        function()
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def lines_of(cell: dict[str, Any]) -> list[str]:
    """Return a size as lines of text."""
    lines = [f"{cell['layer']}, T={cell['tokens']}, {cell['mode']}"]
    for name, figures in cell["contestants"].items():
        if "problem" in figures:
            lines.append(f"  {name:28} {figures['problem']}")
            continue
        tflops = cell["flops"] / figures["seconds"] / 1e12
        line = f"  {name:28} {figures['seconds'] * 1e3:9.3f} ms  {tflops:7.1f} TFLOP/s"
        peak, error = figures.get("peak_bytes"), figures.get("error")
        line += "" if peak is None else f"  peak {peak / 2**20:9.1f} MiB"
        lines.append(line + ("" if error is None else f"  error {error:.0e}"))
    return lines + ratios_of(cell["contestants"])


def ratios_of(contestants: dict[str, dict[str, Any]]) -> list[str]:
    """Return how much faster few bits are than 16."""
    pairs = [(PLAIN, "triton"), (f"{PLAIN}, graph", "triton, graph")]
    seconds = {name: figures.get("seconds") for name, figures in contestants.items()}
    return [
        f"  {name} runs at {seconds[usual] / seconds[name]:.2f} times the speed of {usual}"
        for usual, name in pairs
        if seconds.get(usual) and seconds.get(name)
    ]


class Part(NamedTuple):
    """Some sizes and modes of a layer."""

    layer: str
    tokens: tuple[int, ...]
    modes: tuple[str, ...]

    @property
    def num_cells(self) -> int:
        """How many measurements it is."""
        return len(self.tokens) * len(self.modes)


def run_part(part: Part, device: str, stop: float, cells_left: int) -> list[dict[str, Any]]:
    """Measure the sizes of one layer; each may take its share of what is left of the time."""
    layer, is_cuda = LAYERS[part.layer], device == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    experts, _, d_model, d_expert = layer
    sizes = ((experts, 2 * d_expert, d_model), (experts, d_model, d_expert))
    fc1_EHD, fc2_EDF = (
        torch.empty(size, device=device, dtype=dtype).normal_(std=size[2] ** -0.5).requires_grad_()
        for size in sizes
    )
    quantized: dict[str, QuantizedExpertWeights] = {}
    cells = []
    for num_tokens, mode in itertools.product(part.tokens, part.modes):
        budget_s = (stop - time.monotonic()) / cells_left
        cells_left -= 1
        if budget_s <= 0:
            break
        problem = Problem(layer, fc1_EHD, fc2_EDF, num_tokens)
        has_backward = mode == "forward and backward"
        if mode in QUANTIZED_MODES:
            if mode not in quantized:
                plain = ExpertWeights(fc1_EHD, fc2_EDF)
                quantized[mode] = quantize_experts(plain, QUANTIZED_MODES[mode])
            contestants = quantized_contestants_of(problem, quantized[mode], is_cuda)
        else:
            contestants = contestants_of(problem, has_backward, is_cuda)
        cell = {
            "layer": part.layer,
            "tokens": num_tokens,
            "mode": mode,
            "flops": problem.forward_flops * (3 if has_backward else 1),
            "contestants": measure(contestants, is_cuda, budget_s / 2),
        }
        cells.append(cell)
        print("\n".join(lines_of(cell)), flush=True)
        del problem, contestants
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()
    return cells


def main() -> None:
    """Measure all sizes within the time given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    usual = [name for name in LAYERS if name != "tiny"]
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=usual)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--quantized-tokens", nargs="*", type=int, default=QUANTIZED_TOKENS)
    parser.add_argument("--budget-s", type=float, default=330)
    arguments = parser.parse_args()
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        from expert_mlp_cpu import LAYERS as CPU_LAYERS
        from expert_mlp_cpu import TOKENS as CPU_TOKENS
        from expert_mlp_cpu import run_all

        names = [name for name in arguments.layers if name in CPU_LAYERS]
        tokens = CPU_TOKENS if arguments.tokens is TOKENS else arguments.tokens
        run_all(names, list(tokens), [torch.bfloat16, torch.float32])
        return
    stop = time.monotonic() + arguments.budget_s
    # Every layer's most wanted sizes come before any layer's others.
    tokens = tuple(arguments.tokens)
    wanted = [Part(layer, tokens[:3], MODES) for layer in arguments.layers]
    few_bits = [
        Part(layer, tuple(arguments.quantized_tokens), tuple(QUANTIZED_MODES))
        for layer in arguments.layers
        if layer in QUANTIZED_LAYERS
    ]
    others = [Part(layer, tokens[3:], MODES) for layer in arguments.layers if tokens[3:]]
    plan = wanted + few_bits + others
    cells_left = sum(part.num_cells for part in plan)
    cells: list[dict[str, Any]] = []
    is_cuda = arguments.device == "cuda"
    gpu = torch.cuda.get_device_name() if is_cuda else "none"
    for part in plan:
        cells += run_part(part, arguments.device, stop, cells_left)
        cells_left -= part.num_cells
        write_results(f"expert_mlp_{arguments.device}", {"gpu": gpu, "cells": cells})


if __name__ == "__main__":
    main()
