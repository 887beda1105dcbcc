"""What choosing costs next to the MoE layer: each router, 4096 tokens, 64 experts, a CPU.

    python benchmarks/router_overhead.py [--threads 2] [--repeats 9]

For each router, interleaved: the whole layer (width 1024, experts of 512), its scores alone (their
products with the rows, two for learned noise, cosines and sparsity), and from rows to grouped rows.
Overhead is the last minus the scores, over the layer: what the rule itself adds. Medians, forward
in evaluation and in training with its losses.

T tokens, D model width, E experts.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from router_arms import OVERHEAD
from torch import Tensor

import moeyard
from moeyard.kernels.values.grouping import group_tokens
from moeyard.moe.routers.cosine import CosineRouter
from moeyard.moe.routers.draws import sequence_keys
from moeyard.moe.routers.kmeans import KMeansRouter
from moeyard.moe.routers.linear import LinearRouter, project
from moeyard.moe.routers.noisy import NoisyRouter
from moeyard.moe.routers.router import Router
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.sparsity import SparsityRouter
from moeyard.moe.routers.split_rows import split_rows

from report import write_results

T, D, F, E, VOCABULARY, LENGTH = 4096, 1024, 512, 64, 32000, 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ids_T = torch.randint(0, VOCABULARY, (T,))
    lengths = (LENGTH,) * (T // LENGTH)
    given = RouterInput(
        torch.randn(T, D), ids_T, lengths=lengths, draw_keys=sequence_keys(ids_T, lengths)
    )
    rows: dict[str, dict[str, Any]] = {}
    print(
        "| router | layer ms | scores ms | rule ms | of the layer | in training ms | of the layer |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, section in OVERHEAD.items():
        config = moeyard.router(**section)
        activation = "reglu" if config.reads_gates else "swiglu"
        layer = moeyard.MoELayer(D, F, E, config, activation, vocab_size=VOCABULARY)
        row = measured(layer, given, arguments.repeats)
        rows[name] = row
        print(
            f"| {name} | {row['layer']:.1f} | {row['scores']:.1f} | {row['rule']:.1f} "
            f"| {row['share']:.1%} | {row['train_rule']:.1f} | {row['train_share']:.1%} |",
            flush=True,
        )
    question = "time of a router's rule, from scores to grouped rows, next to the whole MoE layer"
    figures = {"question": question, "threads": arguments.threads, "rows": rows}
    print(f"written to {write_results('router_overhead', figures)}")


def measured(layer: moeyard.MoELayer, given: RouterInput, repeats: int) -> dict[str, float]:
    """Return medians in milliseconds, and shares of the layer."""
    assert given.x_TD is not None
    gate, x_TD = layer.gate, given.x_TD

    def route() -> None:
        routing = gate.route(given)
        experts_TK = routing.experts_TK
        if gate.config.varies:
            _, experts_TK, _ = split_rows(experts_TK, routing.weights_TK, gate.k)
        group_tokens(experts_TK, E)

    def whole() -> None:
        layer(x_TD, routing=gate.route(given))

    calls: dict[str, Callable[[], None]] = {
        "layer": whole,
        "scores": lambda: score(gate, x_TD),
        "route": route,
    }
    times: dict[str, list[float]] = {name: [] for name in (*calls, *(f"train_{c}" for c in calls))}
    for _ in range(repeats + 1):  # the first is not counted
        for prefix in ("", "train_"):
            layer.train(bool(prefix))
            for name, call in calls.items():
                with torch.set_grad_enabled(bool(prefix)):
                    started = time.perf_counter()
                    call()
                    times[prefix + name].append(1000 * (time.perf_counter() - started))
    found = {name: statistics.median(values[1:]) for name, values in times.items()}
    for prefix in ("", "train_"):
        found[f"{prefix}rule"] = max(0.0, found[f"{prefix}route"] - found[f"{prefix}scores"])
        found[f"{prefix}share"] = found[f"{prefix}rule"] / found[f"{prefix}layer"]
    return found


def score(gate: Router, x_TD: Tensor) -> None:
    """Compute a router's scores: the products of its weights with the rows."""
    if isinstance(gate, KMeansRouter):
        gate.squared_distances(x_TD)
    elif isinstance(gate, LinearRouter | CosineRouter):
        gate.logits(x_TD)
    elif isinstance(gate, SparsityRouter):
        project(x_TD, gate.mean_ED)
        project(x_TD, gate.variance_ED)
    if isinstance(gate, NoisyRouter) and gate.training and gate.noise_weight is not None:
        project(x_TD, gate.noise_weight)


if __name__ == "__main__":
    main()
