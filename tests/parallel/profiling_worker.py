"""One rank of the profiling tests.

    profiling_worker.py RANK RANKS STORE_FILE

Prints what the rank found as a line of JSON. Then rank 1 is killed, and the others print the
seconds until they noticed.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from moeyard.moe.experts.resident import Experts
from moeyard.parallel.experts.open_path import open_path
from moeyard.parallel.experts.pipelined import Degrees
from moeyard.parallel.mesh import Mesh, build_mesh
from moeyard.parallel.planning.cost_model import CostModel
from moeyard.parallel.profiling.layer import LayerShape, measure_layer
from moeyard.parallel.profiling.links import all_reduce_probe
from moeyard.parallel.profiling.measure import Probe, Trial, halvings, measure

LIMIT_S = 20
EXPERTS, WIDTH, CHOICES, TOKENS = 8, 64, 2, 256
CPU = torch.device("cpu")


def layer(mesh: Mesh, kind: str, ranks_per_node: int) -> CostModel:
    path = open_path(kind, Degrees(2, 2), EXPERTS, mesh, ranks_per_node, LIMIT_S)
    experts = Experts(WIDTH, 32, EXPERTS, mesh.local_experts(EXPERTS))
    shape = LayerShape(TOKENS, EXPERTS, CHOICES, WIDTH, torch.float32)
    model = measure_layer(shape, path.levels, experts, mesh, CPU)
    assert all(parameter.grad is None for parameter in experts.parameters())
    return model


def measured(mesh: Mesh) -> dict[str, object]:
    """A layer on one level of ranks and on two, and sums of gradients."""
    sums = all_reduce_probe("gradients", dist.group.WORLD, halvings(1 << 20, 3), CPU)
    return {
        "one_level": asdict(layer(mesh, "all_to_all", 1)),
        "two_levels": asdict(layer(mesh, "hierarchical", 2)),
        "collectives": measure([sums], mesh, CPU),
    }


def slow_rank(mesh: Mesh) -> object:
    """Rank 1 is slow, and the time limit of a second cuts the ladder."""
    prepared = []

    def prepare(amount: int) -> Trial:
        prepared.append(amount)
        return Trial(amount + mesh.rank, lambda: time.sleep(0.002 * amount * mesh.rank))

    samples = measure([Probe("dispatch", halvings(64, 7), prepare)], mesh, CPU, limit_s=0.15)
    return {"prepared": prepared, "samples": samples}


def lose_rank_1(mesh: Mesh) -> None:
    """Kill rank 1 while all measure."""

    def run() -> None:
        if mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    measure([Probe("dispatch", [1, 2, 4], lambda amount: Trial(amount, run))], mesh, CPU)


def main() -> None:
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=LIMIT_S),
    )
    mesh = build_mesh(ranks, EXPERTS, timeout_s=LIMIT_S)
    print(json.dumps({**measured(mesh), "slow": slow_rank(mesh)}), flush=True)
    began = time.monotonic()
    try:
        lose_rank_1(mesh)
    except RuntimeError:
        print(time.monotonic() - began)


if __name__ == "__main__":
    main()
