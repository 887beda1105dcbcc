"""A rank of benchmarks/fsmoe.py: time an MoE layer in every number of chunks, and let it choose.

python fsmoe_case.py CONFIGURATIONS_JSON REPEATS

Rank 0 prints one line of JSON for each configuration.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

import moeyard
from moeyard.moe.experts.path import ExpertPath
from moeyard.moe.layer import MoELayer
from moeyard.moe.routers.routing import Routing, count_choices
from moeyard.parallel.experts.open_path import PathKind, open_path
from moeyard.parallel.experts.pipelined import Degrees, PipelinedPath
from moeyard.parallel.mesh import Mesh, build_mesh
from moeyard.parallel.planning.even_work import even_work
from moeyard.parallel.planning.pipeline import best_degrees
from moeyard.parallel.process import process_group
from moeyard.parallel.profiling.layer import LayerShape, measure_layer

from skew import experts_of

CANDIDATES = (1, 2, 4)
PAIRS = [(forward, backward) for forward in CANDIDATES for backward in CANDIDATES]
KINDS: tuple[PathKind, ...] = ("all_to_all", "hierarchical")
FITTED = ("dispatch", "gather", "experts")
CPU = torch.device("cpu")
PLAIN = "plain"
LIMIT_S = 120


def main() -> None:
    configurations, repeats = json.loads(sys.argv[1]), int(sys.argv[2])
    with process_group(LIMIT_S) as watch:
        for number, configuration in enumerate(configurations):
            mesh = build_mesh(dist.get_world_size(), configuration["experts"], watch, LIMIT_S)
            found = measure(configuration, mesh, repeats, number)
            if mesh.rank == 0:
                print(json.dumps(configuration | found), flush=True)
            mesh.barrier()


def measure(configuration: dict, mesh: Mesh, repeats: int, number: int) -> dict:
    """Return the chosen chunks and the median seconds of every pair and of the plain path."""
    tokens, experts, k = (configuration[name] for name in ("tokens", "experts", "k"))
    width = configuration["width"]
    layer = MoELayer(
        width,
        configuration["inner"],
        experts,
        moeyard.TopK(k=k),
        expert_ids=mesh.local_experts(experts),
    )
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = LayerShape(tokens, experts, k, width, torch.float32)
    arms: dict[str, tuple[ExpertPath, Degrees]] = {}
    predicted, fitted = {}, {}
    for kind in KINDS:
        path = open_path(kind, Degrees(), experts, mesh, per_node, LIMIT_S, has_copies=True)
        assert isinstance(path, PipelinedPath)
        model = measure_layer(shape, path.levels, layer.experts, mesh, CPU, limit_s=5)
        inside = per_node if kind == "hierarchical" else 1
        work = even_work(tokens, experts, k, 4 * width, ranks=mesh.ep_size, ranks_per_node=inside)
        best = best_degrees(model, work, CANDIDATES)
        predicted[f"{kind} {best.forward}/{best.backward}"] = best.forward_s + best.backward_s
        fitted[kind] = {name: round(getattr(model, name).r2, 3) for name in FITTED}
        for pair in PAIRS:
            arms[f"{kind} {pair[0]}/{pair[1]}"] = (path, Degrees(*pair))
    arms[PLAIN] = (
        open_path("all_to_all", Degrees(), experts, mesh, per_node, LIMIT_S),
        Degrees(),
    )
    rows_TD = torch.randn(tokens, width, requires_grad=True)
    routing = routing_of(configuration, mesh, number)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):  # the first is not counted
        for name, (path, degrees) in arms.items():
            layer.path = path
            if isinstance(path, PipelinedPath):
                path.degrees = degrees
            seconds = step(layer, rows_TD, routing, mesh)
            if repeat:
                times[name].append(seconds)
    chosen = min(predicted, key=lambda name: predicted[name])
    return {
        "chosen": chosen,
        "predicted_s": predicted[chosen],
        "predicted": predicted,
        "r2": fitted,
        "seconds": times,
    }


def routing_of(configuration: dict, mesh: Mesh, step_number: int) -> Routing:
    """Return this rank's part of the declared load."""
    tokens, experts, k = (configuration[name] for name in ("tokens", "experts", "k"))
    whole = experts_of(configuration["skew"], step_number, tokens * mesh.world_size, experts, k)
    here_TK = whole[mesh.rank * tokens : (mesh.rank + 1) * tokens]
    weights_TK = torch.full((tokens, k), 1 / k, requires_grad=True)
    return Routing(here_TK, weights_TK, count_choices(here_TK, experts), torch.tensor(tokens))


def step(layer: MoELayer, rows_TD: Tensor, routing: Routing, mesh: Mesh) -> float:
    """Return the seconds of forward and backward on the slowest rank."""
    mesh.barrier()
    began = time.perf_counter()
    y_TD, _ = layer(rows_TD, routing=routing)
    y_TD.sum().backward()
    elapsed = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    layer.zero_grad(set_to_none=True)
    rows_TD.grad = None
    return float(elapsed)


if __name__ == "__main__":
    main()
