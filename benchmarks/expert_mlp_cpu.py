"""The expert MLP on a CPU: ``python benchmarks/expert_mlp.py --device cpu`` runs this.

Every contestant has the same experts and the same routing, keeps freed memory, and takes turns with
the others; figures are medians. Two bounds are measured in the same run:

- ``floor``: the products of each expert at its number of rows (2 forward, 6 with backward), one
  after the other by ``torch.mm`` into buffers that are there: no gathering, activation or sum. One
  routing serves all rounds, so that oneDNN has its code for every shape.
- ``memory``: summing all of the layer's plain weights. For few tokens the table shows
  the bytes of the chosen experts per second as a share of it. Routing is then new in every call,
  and the experts are much larger than the caches.

For few tokens the experts have the models' widths (Mixtral: half), so that memory is measured. For
many tokens they have half (Mixtral: half, and a quarter of the experts' width), so that a round
takes seconds. Forward and backward is measured with one routing for all rounds, which favours
libraries that compile code by shape. In bf16 it is also measured with a new routing in every call,
as in training.

T tokens, K choices, R = T*K routed rows, E experts, D model width, F expert width.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from expert_mlp_cpu_case import Case, Layer
from expert_mlp_cpu_peers import PEERS
from torch import Tensor

from moeyard.kernels.cpu.library import load
from moeyard.kernels.experts import Backend, expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights, empty_slots
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.kernels.values.quantize import quantize_experts
from moeyard.kernels.values.quantized_weights import SlotWeights
from moeyard.training.run.allocator import keep_freed_memory

from report import write_results

LAYERS = {
    "OLMoE": (Layer(64, 8, 2048, 1024), Layer(64, 8, 1024, 512)),
    "Qwen3-30B-A3B": (Layer(128, 8, 2048, 768), Layer(128, 8, 1024, 384)),
    "Mixtral-8x7B": (Layer(8, 2, 2048, 7168), Layer(8, 2, 2048, 3584)),
}
"""For few tokens and for many."""
TOKENS = (1, 4, 16, 64, 512, 4096)
TRAINING_TOKENS = (64, 512, 4096)
DECODE_TOKENS = 16
"""Up to here routing is new in every round, and speed is bytes of weights per second."""
MAX_ERROR = 3e-2
"""Of bf16 against fp32; of our own experts in 8 and 4 bits, against their rounded weights."""
BUDGET_S, MAX_ROUNDS, MIN_ROUNDS = 5.0, 25, 3
PAUSE_S, CALLS = 0.02, 3
"""Seconds of waiting before a turn, and calls in a turn. OpenMP's threads spin for milliseconds
after a call, even the softmax of the routing, and would take a core from the next contestant. The
first call of a turn wakes threads and is not timed."""
LONG_S = 0.2
"""Longer calls than this are not affected: one call a turn."""


def ours(case: Case, experts: SlotWeights, backend: Backend) -> Callable[[], Tensor]:
    """Return our forward pass."""

    @torch.no_grad()
    def forward() -> Tensor:
        return expert_mlp(case.x_TD, case.experts_TK, case.weights_TK, experts, backend)

    return forward


def ours_training(case: Case, backend: Backend) -> Callable[[], tuple[Tensor, ...]]:
    """Return forward and backward with weight gradients in fp32 sums, as in training."""
    plain = case.experts
    totals = [torch.zeros(w.shape) for w in (plain.fc1_SHD, plain.fc2_SDF)]

    def both() -> tuple[Tensor, ...]:
        sums = MainGrads(totals[0], totals[1], is_empty=True)
        experts = ExpertWeights(plain.fc1_SHD, plain.fc2_SDF, main_grads=sums)
        y_TD = expert_mlp(case.x_TD, case.experts_TK, case.weights_TK, experts, backend)
        return torch.autograd.grad(y_TD, (case.x_TD, case.weights_TK), case.upstream_TD)

    return both


@torch.no_grad()
def floor(case: Case, has_backward: bool) -> Callable[[], None]:
    """Return the products of each expert at its number of rows, and nothing else."""
    fc1_EHD, fc2_EDF = case.experts.fc1_SHD.detach(), case.experts.fc2_SDF.detach()
    experts = [(e, count) for e, count in enumerate(case.counts_E) if count]
    most = max(count for _, count in experts)
    d_model, width, d_expert = fc1_EHD.shape[2], fc1_EHD.shape[1], fc2_EDF.shape[2]
    x_nD, y_nD, h_nH, a_nF = (
        torch.randn(most, size).to(fc1_EHD.dtype) for size in (d_model, d_model, width, d_expert)
    )
    out_nD, out_nH, out_nF = (torch.empty_like(t) for t in (x_nD, h_nH, a_nF))
    grad1, grad2 = torch.empty_like(fc1_EHD), torch.empty_like(fc2_EDF)

    @torch.no_grad()
    def products() -> None:
        for e, n in experts:
            torch.mm(x_nD[:n], fc1_EHD[e].t(), out=out_nH[:n])
            torch.mm(a_nF[:n], fc2_EDF[e].t(), out=out_nD[:n])
            if has_backward:
                torch.mm(y_nD[:n], fc2_EDF[e], out=out_nF[:n])
                torch.mm(y_nD[:n].t(), a_nF[:n], out=grad2[e])
                torch.mm(h_nH[:n], fc1_EHD[e], out=out_nD[:n])
                torch.mm(h_nH[:n].t(), x_nD[:n], out=grad1[e])

    return products


def memory_rate(experts: ExpertWeights) -> float:
    """Return bytes per second of summing these same weights, read as fp32.

    A shared machine has faster and slower memory, so other memory would give another rate.
    """
    parts = [w.detach().view(torch.float32) for w in (experts.fc1_SHD, experts.fc2_SDF)]
    times = []
    for _ in range(8):
        start_s = time.perf_counter()
        for part in parts:
            part.sum()
        times.append(time.perf_counter() - start_s)
    return sum(part.nbytes for part in parts) / statistics.median(times)


class Contestant(NamedTuple):
    """A function to time, and the result that it must agree with."""

    run: Callable[[], Any]
    bits: float
    """Bits of a weight, for the bytes that are read."""
    expected: Callable[[], Any] | None = None


def contestants_of(case: Case, formats: dict[str, SlotWeights], has_backward: bool) -> dict:
    """Return all contestants of a cell by name."""
    bits = 8 * case.experts.fc1_SHD.element_size()
    if has_backward:
        found = {
            "moeyard (auto)": Contestant(ours_training(case, "auto"), bits),
            "moeyard (torch)": Contestant(ours_training(case, "torch"), bits),
        }
    else:
        found = {
            "moeyard (auto)": Contestant(ours(case, case.experts, "auto"), bits),
            "moeyard (torch)": Contestant(ours(case, case.experts, "torch"), bits),
        }
        for name, experts in formats.items():
            size = experts.nbytes / (experts.num_slots * 3 * case.layer.d_model)  # type: ignore
            size *= 8 / case.layer.d_expert
            right = ours(case, experts, "reference")
            found[f"moeyard {name}"] = Contestant(ours(case, experts, "auto"), size, right)
            if case.x_TD.shape[0] <= DECODE_TOKENS:
                found[f"moeyard {name} (torch)"] = Contestant(
                    ours(case, experts, "torch"), size, right
                )
    found["floor"] = Contestant(floor(case, has_backward), bits)  # of the first routing
    for name, build in PEERS.items():
        peer = build(case, has_backward)
        if peer is not None:
            found[name] = Contestant(peer, bits)
    return found


def check(name: str, contestant: Contestant, right: Any) -> float | None:
    """Return the largest error; raise if it is too large. None for peers with another router."""
    found = contestant.run()
    if found is None:
        return None
    expected = right if contestant.expected is None else contestant.expected()
    pairs = [(found, expected)] if isinstance(found, Tensor) else [(found[0], expected[0])]
    error = max(float((a.float() - b.float()).abs().max() / b.abs().max()) for a, b in pairs)
    if not error <= MAX_ERROR:
        raise ValueError(f"{name} is off by {error:.1e}")
    return error


def measure(case: Case, contestants: dict[str, Contestant], new_routing: bool) -> dict[str, dict]:
    """Check all, then time them in turns."""
    right = contestants["moeyard (torch)"].run()
    figures: dict[str, dict[str, Any]] = {}
    is_long = {}
    for name, contestant in contestants.items():
        start_s = time.perf_counter()
        figures[name] = {"error": check(name, contestant, right)}
        is_long[name] = time.perf_counter() - start_s > LONG_S
    times: dict[str, list[float]] = {name: [] for name in contestants}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    stop = time.monotonic() + BUDGET_S
    for number in itertools.count():
        if number >= MAX_ROUNDS or (number >= MIN_ROUNDS and time.monotonic() > stop):
            break
        order = list(contestants.items())
        for name, contestant in order[number % len(order) :] + order[: number % len(order)]:
            num_calls = 1 if is_long[name] else CALLS
            routings = [case.routing() for _ in range(num_calls)] if new_routing else []
            time.sleep(PAUSE_S)
            for call in range(num_calls):
                if new_routing:
                    case.use(routings[call])
                start_s = time.perf_counter()
                contestant.run()
                taken_s = time.perf_counter() - start_s
                if call or is_long[name]:
                    times[name].append(taken_s)
                    rates[name].append(case.weight_bytes(contestant.bits) / taken_s)
    for name in contestants:
        figures[name]["seconds"] = statistics.median(times[name])
        figures[name]["weights_bytes_per_s"] = statistics.median(rates[name])
        figures[name]["rounds"] = len(times[name])
    return figures


def cells_of(layer_name: str, dtype: torch.dtype, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the figures of each size, with and without backward."""
    for layer, is_decode in zip(LAYERS[layer_name], (True, False), strict=True):
        some = [t for t in tokens if (t <= DECODE_TOKENS) == is_decode]
        if some:
            yield from cells_of_layer(layer_name, layer, dtype, some)


def cells_of_layer(
    layer_name: str, layer: Layer, dtype: torch.dtype, tokens: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield the figures of each size of one shape."""
    torch.manual_seed(0)
    sizes = ((2 * layer.d_expert, layer.d_model), (layer.d_model, layer.d_expert))
    fc1_EHD, fc2_EDF = (empty_slots(layer.num_experts, *size, dtype) for size in sizes)
    for weight in (fc1_EHD, fc2_EDF):
        for matrix in weight:
            matrix.copy_(torch.randn(matrix.shape) * matrix.shape[1] ** -0.5)
    plain = ExpertWeights(fc1_EHD.requires_grad_(), fc2_EDF.requires_grad_())
    formats = {"int8": quantize_experts(plain, 8), "int4": quantize_experts(plain, 4)}
    for num_tokens in tokens:
        is_decode = num_tokens <= DECODE_TOKENS
        modes = [("forward", is_decode)]
        if num_tokens in TRAINING_TOKENS:
            modes.append(("forward and backward", False))
            if dtype == torch.bfloat16:  # in fp32, oneDNN's code serves all shapes
                modes.append(("forward and backward, new routing", True))
        for mode, new_routing in modes:
            has_backward = mode != "forward"
            case = Case(layer, plain, num_tokens)
            contestants = contestants_of(case, formats, has_backward)
            flops = (18 if has_backward else 6) * case.num_rows * layer.d_model * layer.d_expert
            yield {
                "layer": layer_name,
                "shape": layer._asdict(),
                "type": str(dtype).removeprefix("torch."),
                "tokens": num_tokens,
                "mode": mode,
                "rows_per_expert": case.num_rows / layer.num_experts,
                "flops": flops,
                "memory_bytes_per_s": memory_rate(plain) if is_decode else None,
                "contestants": measure(case, contestants, new_routing),
            }


def lines_of(cell: dict[str, Any]) -> list[str]:
    """Return a size as lines of text; ratios are the floor's or memory's time over its own."""
    found = cell["contestants"]
    title = f"{cell['layer']} {cell['type']}, T={cell['tokens']}, {cell['mode']}, "
    lines = [title + f"{cell['rows_per_expert']:.3g} rows an expert"]
    memory = cell["memory_bytes_per_s"]
    if memory is not None:
        lines[0] += f", memory {memory / 1e9:.1f} GB/s"
    base_s = found["floor"]["seconds"]
    for name, figures in found.items():
        seconds = figures["seconds"]
        line = f"  {name:24} {seconds * 1e3:9.3f} ms  floor x{base_s / seconds:5.2f}"
        if memory is not None:
            rate = figures["weights_bytes_per_s"]
            line += f"  {rate / 1e9:6.1f} GB/s = x{rate / memory:4.2f} of memory"
        else:
            line += f"  {cell['flops'] / seconds / 1e9:7.1f} GFLOP/s"
        error = figures["error"]
        lines.append(line + ("" if error is None else f"  error {error:.0e}"))
    return lines


def run_all(layers: list[str], tokens: list[int], dtypes: list[torch.dtype]) -> None:
    """Measure, print and write the results after every layer and type."""
    keep_freed_memory()
    cells = []
    print(f"{torch.get_num_threads()} threads, C++ kernels: {load().state}", flush=True)
    for name, dtype in itertools.product(layers, dtypes):
        for cell in cells_of(name, dtype, tokens):
            cells.append(cell)
            print("\n".join(lines_of(cell)), flush=True)
        facts = {"threads": torch.get_num_threads(), "kernels": load().state}
        write_results("expert_mlp_cpu", {**facts, "cells": cells})
