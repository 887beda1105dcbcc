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
from moeyard.parallel.planning.trials import Trials
from moeyard.parallel.process import process_group
from moeyard.parallel.profiling.candidates import Candidate, find_candidates
from moeyard.parallel.profiling.layer import LayerShape

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
    """Return the chosen chunks and the seconds of every pair and of the plain path."""
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
    paths: dict[PathKind, PipelinedPath] = {}
    for kind in KINDS:
        path = open_path(kind, Degrees(), experts, mesh, per_node, LIMIT_S, has_copies=True)
        assert isinstance(path, PipelinedPath)
        paths[kind] = path
    rows_TD = torch.randn(tokens, width, requires_grad=True)
    routing = routing_of(configuration, mesh, number)

    def run(path: ExpertPath, degrees: Degrees) -> float:
        layer.path = path
        if isinstance(path, PipelinedPath):
            path.degrees = degrees
        return step(layer, rows_TD, routing, mesh)

    candidates = find_candidates(paths, shape, layer.experts, mesh, CPU)
    trials = Trials(candidates, lambda seconds: seconds)  # a step's are those of the slowest rank
    while trials.best is None:
        trials.note(run(trials.current.path, degrees_of(trials.current)))
    chosen = trials.best
    arms: dict[str, tuple[ExpertPath, Degrees]] = {
        f"{kind} {pair[0]}/{pair[1]}": (path, Degrees(*pair))
        for kind, path in paths.items()
        for pair in PAIRS
    }
    arms[name_of(chosen)] = (chosen.path, degrees_of(chosen))
    plain = open_path("all_to_all", Degrees(), experts, mesh, per_node, LIMIT_S)
    arms[PLAIN] = (plain, Degrees())
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):  # the first is not counted
        for name, (path, degrees) in arms.items():
            seconds = run(path, degrees)
            if repeat:
                times[name].append(seconds)
    return {
        "chosen": name_of(chosen),
        "predicted_s": chosen.degrees.seconds,
        "predicted": {name_of(one): one.degrees.seconds for one in candidates},
        "contention": {one.kind: one.model.contention for one in candidates},
        "r2": {
            one.kind: {name: round(getattr(one.model, name).r2, 3) for name in FITTED}
            for one in candidates
        },
        "seconds": times,
    }


def degrees_of(candidate: Candidate) -> Degrees:
    return Degrees(candidate.degrees.forward, candidate.degrees.backward)


def name_of(candidate: Candidate) -> str:
    return f"{candidate.kind} {candidate.degrees.forward}/{candidate.degrees.backward}"


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
