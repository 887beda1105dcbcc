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
from moeyard.parallel.experts.open_path import open_path
from moeyard.parallel.experts.pipelined import Degrees, PipelinedPath
from moeyard.parallel.mesh import Mesh, build_mesh
from moeyard.parallel.planning.even_work import even_work
from moeyard.parallel.planning.pipeline import best_degrees
from moeyard.parallel.process import process_group
from moeyard.parallel.profiling.layer import LayerShape, measure_layer

from skew import experts_of

CANDIDATES = (1, 2, 4)
PAIRS = [(forward, backward) for forward in CANDIDATES for backward in CANDIDATES]
FITTED = ("dispatch", "gather", "experts")
CPU = torch.device("cpu")


def main() -> None:
    configurations, repeats = json.loads(sys.argv[1]), int(sys.argv[2])
    with process_group(120) as watch:
        for number, configuration in enumerate(configurations):
            mesh = build_mesh(dist.get_world_size(), configuration["experts"], watch, 120)
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
    plain = open_path("all_to_all", Degrees(), experts, mesh, per_node, 120)
    path = open_path("hierarchical", Degrees(), experts, mesh, per_node, 120)
    assert isinstance(path, PipelinedPath)
    shape = LayerShape(tokens, experts, k, width, torch.float32)
    model = measure_layer(shape, path.levels, layer.experts, mesh, CPU)
    work = even_work(tokens, experts, k, 4 * width, ranks=mesh.ep_size, ranks_per_node=per_node)
    chosen = best_degrees(model, work, CANDIDATES)
    rows_TD = torch.randn(tokens, width, requires_grad=True)
    routing = routing_of(configuration, mesh, number)
    arms: dict[str, tuple[ExpertPath, Degrees]] = {"plain": (plain, Degrees())}
    arms |= {f"{pair[0]}/{pair[1]}": (path, Degrees(*pair)) for pair in PAIRS}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):  # the first is not counted
        for name, (layer.path, path.degrees) in arms.items():
            seconds = step(layer, rows_TD, routing, mesh)
            if repeat:
                times[name].append(seconds)
    return {
        "chosen": f"{chosen.forward}/{chosen.backward}",
        "predicted_s": chosen.forward_s + chosen.backward_s,
        "r2": {
            name: round(getattr(model, name).r2, 3) for name in ("dispatch", "gather", "experts")
        },
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
