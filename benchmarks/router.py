"""The choice of experts in Triton against torch's operators on a GPU, without the projection.

    python benchmarks/router.py --device cuda            # benchmarks/gpu.sh runs it, too
    TRITON_INTERPRET=1 python benchmarks/router.py --device cpu --tokens 9

Logits in, weights, counts and loss sums out, as in training; then the same with the gradient of the
logits. The floor is reading the logits once, and for the gradient reading them twice and writing
it once. Figures are medians with L2 overwritten before each call.

T tokens, E experts.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from expert_mlp import measure
from torch import Tensor

from moeyard.kernels.router import choose
from moeyard.kernels.values.choice import ChoiceRule

from report import write_results

ROUTERS = {
    "Mixtral-8x7B": (8, ChoiceRule(k=2)),
    "Qwen3-30B-A3B": (128, ChoiceRule(k=8)),
    "Qwen3-Next-80B": (512, ChoiceRule(k=10)),
    "DeepSeek-V3": (
        256,
        ChoiceRule(k=8, score="sigmoid", scale=2.5, num_groups=8, top_groups=4),
    ),
}
TOKENS = (32768, 4096, 64)


def contestant(
    backend: Any, logits_TE: Tensor, bias_E: Tensor | None, rule: ChoiceRule, has_backward: bool
) -> Callable[[], Any]:
    """Return what is timed: outputs with gradients, or the gradient of the logits."""
    leaf_TE = logits_TE.requires_grad_()

    def forward() -> tuple[Tensor, ...]:
        made = choose(leaf_TE, bias_E, None, rule, True, backend)
        assert made.sums is not None
        return (made.weights_TK, *made.sums)

    def both() -> tuple[Tensor, ...]:
        outputs = forward()
        return torch.autograd.grad(outputs, leaf_TE, [torch.ones_like(o) for o in outputs])

    return both if has_backward else torch.no_grad()(forward)


def main() -> None:
    """Measure all sizes within the time given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--budget-s", type=float, default=40)
    arguments = parser.parse_args()
    is_cuda = arguments.device == "cuda"
    sizes = [(t, name, both) for t in arguments.tokens for name in ROUTERS for both in (0, 1)]
    stop = time.monotonic() + arguments.budget_s
    cells: list[dict[str, Any]] = []
    for number, (num_tokens, name, has_backward) in enumerate(sizes):
        experts, rule = ROUTERS[name]
        generator = torch.Generator(arguments.device).manual_seed(0)
        size, on = (num_tokens, experts), {"generator": generator, "device": arguments.device}
        # In steps that both round in the same way, so that choices must be equal.
        logits_TE = (torch.randn(size, **on) * 256).round() / 256
        logits_TE += torch.arange(experts, device=arguments.device) / 2**17
        bias_E = torch.randn(experts, **on) / 8 if rule.num_groups > 1 else None
        budget_s = (stop - time.monotonic()) / (len(sizes) - number)
        contestants = {
            backend: contestant(backend, logits_TE, bias_E, rule, bool(has_backward))
            for backend in ("torch", "triton")
        }
        cell = {
            "router": name,
            "tokens": num_tokens,
            "mode": "forward and backward" if has_backward else "forward",
            "floor_bytes": logits_TE.nbytes * (3 if has_backward else 1),
            "contestants": measure(contestants, is_cuda, budget_s / 2),
        }
        cells.append(cell)
        print(f"{name}, T={num_tokens}, {cell['mode']}")
        for backend, figures in cell["contestants"].items():
            line = f"  {backend:8} {figures.get('problem', '')}"
            if "seconds" in figures:
                rate = cell["floor_bytes"] / figures["seconds"] / 1e9
                line += f"{figures['seconds'] * 1e6:9.1f} us  {rate:7.1f} GB/s of the floor's bytes"
            print(line, flush=True)
    gpu = torch.cuda.get_device_name() if is_cuda else "none"
    write_results(f"router_{arguments.device}", {"gpu": gpu, "cells": cells})


if __name__ == "__main__":
    main()
