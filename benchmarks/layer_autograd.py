"""How fast is an MoE layer in a user's training loop, where autograd returns all gradients?

    python benchmarks/layer_autograd.py [--busy 2] [--layer NAME] [--train all|router|lora]

One ``MoELayer`` against transformers' Qwen3-MoE block with the same weights: forward and backward,
gradients of x and of what trains. ``all``: every weight. ``router``: the router alone, experts
frozen. ``lora``: low-rank updates of frozen experts, against the same block under PEFT, which adds
``B A`` to the weights in every step. ``without C++`` is our layer on torch's products
(``MOEYARD_CPU_KERNELS=off``). ``--busy N`` runs N processes that compute all the time next to the
benchmark, like other users of a machine.

Contestants take turns, each in a separate process that waits in between; figures are medians.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from report import write_results

RANK, ALPHA = 8, 16
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 5.0, 5, 40


class Size(NamedTuple):
    """A layer and its tokens."""

    num_experts: int
    num_choices: int
    d_model: int
    d_expert: int
    num_tokens: int


SIZES = {
    "small": Size(16, 2, 256, 512, 2048),
    "fine-grained": Size(64, 8, 512, 256, 2048),
    "Qwen3-30B-A3B/2": Size(128, 8, 1024, 384, 4096),
}
Step = Callable[[], float]
"""Runs forward and backward; returns the mean magnitude of the output."""
MAX_DIFFERENCE = 0.02
"""Of that magnitude, over ours. In bf16 transformers' router rounds its logits; ours does not."""


def fill(weights: list[Any]) -> None:
    """Fill router, fc1 and fc2, which have one shape in all contestants, with the same numbers."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        values = torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
        weight.data.copy_(values)


def our_layer(size: Size, dtype: Any, train: str) -> Step:
    """Return a step of our layer."""
    import torch

    import moeyard

    router = moeyard.TopK(k=size.num_choices)
    layer = moeyard.MoELayer(size.d_model, size.d_expert, size.num_experts, router)
    layer = layer.to(dtype)
    fill([layer.gate.weight, layer.experts.fc1, layer.experts.fc2])
    if train != "all":
        layer.experts.requires_grad_(False)
    if train == "lora":
        layer.gate.requires_grad_(False)
        layer.experts.add_low_rank(RANK, ALPHA / RANK)
        torch.nn.init.normal_(layer.experts.fc1_lora_a, std=size.d_model**-0.5)
        torch.nn.init.normal_(layer.experts.fc2_lora_a, std=size.d_expert**-0.5)
    return _step(size, dtype, layer, lambda x_TD: layer(x_TD)[0])


def transformers_block(size: Size, dtype: Any, train: str, implementation: str) -> Step:
    """Return a step of transformers' block, under PEFT for low-rank updates."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=size.d_model,
        moe_intermediate_size=size.d_expert,
        num_experts=size.num_experts,
        num_experts_per_tok=size.num_choices,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block: Any = Qwen3MoeSparseMoeBlock(config).to(dtype)
    fill([block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj])
    if train != "all":
        block.experts.requires_grad_(False)
    if train == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        names = ["experts.gate_up_proj", "experts.down_proj"]
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
        block = inject_adapter_in_model(lora, torch.nn.ModuleDict({"block": block}))["block"]

    def forward(x_TD: Any) -> Any:
        y = block(x_TD.unsqueeze(0))
        return (y[0] if isinstance(y, tuple) else y).view_as(x_TD)

    return _step(size, dtype, block, forward)


def _step(size: Size, dtype: Any, module: Any, forward: Callable[[Any], Any]) -> Step:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (size.num_tokens, size.d_model)
    x_TD = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    upstream_TD = torch.randn(shape, generator=generator).to(dtype)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert trained, "nothing trains"

    def step() -> float:
        y_TD = forward(x_TD)
        torch.autograd.grad(y_TD, [x_TD, *trained], upstream_TD, allow_unused=True)
        return float(y_TD.detach().abs().mean())

    return step


CONTESTANTS: dict[str, tuple[Callable[..., Step], tuple, dict[str, str]]] = {
    "moeyard": (our_layer, (), {}),
    "moeyard without C++": (our_layer, (), {"MOEYARD_CPU_KERNELS": "off"}),
    "transformers eager": (transformers_block, ("eager",), {}),
    "transformers grouped_mm": (transformers_block, ("grouped_mm",), {}),
}


def serve_steps(pipe: Connection, name: str, size: Size, dtype_name: str, train: str) -> None:
    """Run a step for every message and answer with its seconds."""
    build, arguments, environment = CONTESTANTS[name]
    os.environ.update(environment)
    import torch

    from moeyard.training.run.allocator import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    step = build(size, getattr(torch, dtype_name), train, *arguments)
    pipe.send(step())
    while pipe.recv() == "step":
        start_s = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start_s)


@contextmanager
def neighbours(count: int):  # type: ignore[no-untyped-def]
    """Keep ``count`` processes computing meanwhile."""
    busy = [multiprocessing.Process(target=_compute_without_end, daemon=True) for _ in range(count)]
    for process in busy:
        process.start()
    yield
    for process in busy:
        process.kill()


def _compute_without_end() -> None:
    while True:
        sum(range(100_000))


def measure(size: Size, dtype_name: str, train: str) -> dict[str, float]:
    """Return the median seconds of each contestant's step, taken in turns."""
    pipes: dict[str, Connection] = {}
    magnitudes: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    for name in CONTESTANTS:
        ours, theirs = context.Pipe()
        arguments = (theirs, name, size, dtype_name, train)
        context.Process(target=serve_steps, args=arguments, daemon=True).start()
        theirs.close()
        try:
            magnitudes[name] = ours.recv()
        except EOFError:
            print(f"  {name} cannot run here")
            continue
        pipes[name] = ours
    for name, magnitude in magnitudes.items():
        if abs(magnitude / magnitudes["moeyard"] - 1) > MAX_DIFFERENCE:
            raise ValueError(f"{name} computes something else: {magnitudes}")
    times: dict[str, list[float]] = {name: [] for name in pipes}
    stop = time.monotonic() + SECONDS * len(pipes)
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.monotonic() > stop:
            break
        for name, pipe in pipes.items():
            pipe.send("step")
            times[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send("end")
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure every layer, type and way to train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=0, help="processes that load the machine")
    parser.add_argument("--layer", choices=SIZES, action="append")
    parser.add_argument("--type", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--train", choices=("all", "router", "lora"), action="append")
    parser.add_argument("--output", default="layer_autograd", help="name of the results")
    options = parser.parse_args()
    cells = []
    with neighbours(options.busy):
        for layer in options.layer or SIZES:
            for dtype in options.type or ("float32", "bfloat16"):
                for train in options.train or ("all", "router", "lora"):
                    seconds = measure(SIZES[layer], dtype, train)
                    print(f"{layer} {SIZES[layer]}, {dtype}, trains {train}, {options.busy} busy")
                    for name, taken_s in seconds.items():
                        ratio = taken_s / seconds["moeyard"]
                        print(f"  {name:24} {taken_s * 1e3:9.2f} ms  x{ratio:5.2f}", flush=True)
                    cells.append({"layer": layer, "type": dtype, "train": train, "s": seconds})
    write_results(options.output, {"busy": options.busy, "cells": cells})


if __name__ == "__main__":
    main()
