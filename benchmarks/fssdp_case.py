"""A rank of benchmarks/fssdp.py: steps of a stack of MoE layers, with and without copies.

python fssdp_case.py SETTINGS_JSON

Rank 0 prints one line of JSON for each kind of load.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moeyard
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.moe.experts.resident import Experts
from moeyard.moe.layer import MoELayer
from moeyard.moe.routers.routing import Routing, count_choices
from moeyard.parallel.experts.open_copies import CopyOptions, open_copies
from moeyard.parallel.experts.open_path import open_path
from moeyard.parallel.experts.pipelined import Degrees, PipelinedPath
from moeyard.parallel.mesh import Mesh, build_mesh
from moeyard.parallel.planning.bounds import Traffic
from moeyard.parallel.planning.calibrate import CopyCosts, link_rows
from moeyard.parallel.planning.placement import Placement, Topology
from moeyard.parallel.process import process_group
from moeyard.parallel.profiling.copies import measure_copies
from moeyard.parallel.profiling.layer import LayerShape

from skew import experts_of

LIMIT_S = 120
ARMS = ("plain", "copies", "rematerialized")


def main() -> None:
    settings = json.loads(sys.argv[1])
    with process_group(LIMIT_S) as watch:
        mesh = build_mesh(dist.get_world_size(), settings["experts"], watch, LIMIT_S)
        topology = Topology(mesh.ep_size, int(os.environ["LOCAL_WORLD_SIZE"]))
        costs = {arm: Stack(settings, mesh, topology, arm).costs() for arm in ARMS[1:]}
        if mesh.rank == 0:
            print(json.dumps({"costs": {arm: asdict(cost) for arm, cost in costs.items()}}))
        for kind in settings["kinds"]:
            found = measure(settings, kind, mesh, topology, costs)
            if mesh.rank == 0:
                print(json.dumps({"kind": kind} | found), flush=True)
            mesh.barrier()


def measure(
    settings: dict, kind: str, mesh: Mesh, topology: Topology, costs: dict[str, CopyCosts]
) -> dict:
    """Return the seconds of every step of every arm, interleaved, and what loads allow."""
    stacks = {arm: Stack(settings, mesh, topology, arm, costs.get(arm)) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    shares: dict[str, list[Shares]] = {arm: [] for arm in ARMS}
    for step in range(settings["first"], settings["last"]):
        layers = range(settings["layers"])
        whole = [choices(settings, kind, step, layer, mesh.world_size) for layer in layers]
        for arm, stack in stacks.items():
            elapsed = stack.step(whole)
            if step >= settings["first"] + settings["unmeasured"]:
                seconds[arm].append(elapsed)
                shares[arm].append(stack.shares(whole))
    return {
        "seconds": seconds,
        "shares": {arm: [asdict(step) for step in found] for arm, found in shares.items()},
        "copy_memory": {arm: stack.copy_share() for arm, stack in stacks.items()},
    }


@dataclass(frozen=True)
class Shares:
    """What limits a step, over all layers."""

    computed: float
    """Rows of the fullest rank over the mean."""
    linked: float
    """Rows on the busiest link between nodes over those of even loads without copies."""
    copies: int
    """Experts that other ranks get."""


def choices(settings: dict, kind: str, step: int, layer: int, ranks: int) -> Tensor:
    """Return the experts of all ranks' tokens."""
    tokens = settings["tokens"] * ranks
    return experts_of(kind, step, tokens, settings["experts"], settings["k"], seed=layer)


class Stack:
    """MoE layers with a dense layer before each, and their copies if any."""

    def __init__(
        self,
        settings: dict,
        mesh: Mesh,
        topology: Topology,
        arm: str,
        costs: CopyCosts | None = None,
    ) -> None:
        self._settings, self._mesh, self._topology = settings, mesh, topology
        width, experts = settings["width"], settings["experts"]
        self._dense = [nn.Linear(width, width) for _ in range(settings["layers"])]
        self._layers = [
            MoELayer(
                width,
                settings["inner"],
                experts,
                moeyard.TopK(k=settings["k"]),
                expert_ids=mesh.local_experts(experts),
            )
            for _ in self._dense
        ]
        path = open_path(
            "all_to_all",
            Degrees(),
            experts,
            mesh,
            topology.ranks_per_node,
            LIMIT_S,
            has_copies=arm != "plain",
        )
        for layer in self._layers:
            layer.path = path
            own = experts_of_layer(layer)
            own.main_grads = MainGrads.empty_for((own.fc1, own.fc2, None, None))
        self._copies = None
        if arm != "plain":
            remat = arm == "rematerialized"
            budget = settings["remat_bytes" if remat else "copy_bytes"]
            options = CopyOptions(budget, settings["copied_experts"], remat, 5)
            self._copies = open_copies(self._layers, mesh, topology, options, LIMIT_S)
            self._copies.costs = costs
        self._path = path
        self._x_TD = torch.randn(settings["tokens"], width, requires_grad=True)

    def costs(self) -> CopyCosts:
        """Measure what copies cost and save."""
        own = self._settings
        shape = LayerShape(own["tokens"], own["experts"], own["k"], own["width"], torch.float32)
        assert self._copies is not None and isinstance(self._path, PipelinedPath)
        model = (self._copies, shape, self._path.levels, self._mesh, torch.device("cpu"))
        return measure_copies(*model, micro_batches=1)

    def step(self, whole: list[Tensor]) -> float:
        """Run forward and backward; return the seconds of the slowest rank."""
        tokens, rank = self._settings["tokens"], self._mesh.rank
        routings = []
        for experts_TK in whole:
            here_TK = experts_TK[rank * tokens : (rank + 1) * tokens]
            weights_TK = torch.full(here_TK.shape, 1 / here_TK.shape[1], requires_grad=True)
            counts_E = count_choices(here_TK, self._settings["experts"])
            routings.append(Routing(here_TK, weights_TK, counts_E, torch.tensor(tokens)))
        for layer in self._layers:
            main = experts_of_layer(layer).main_grads
            assert main is not None
            main.is_empty = True
        self._mesh.barrier()
        began = time.perf_counter()
        if self._copies is not None:
            self._copies.begin_step(1)
        x_TD = self._x_TD
        for dense, layer, routing in zip(self._dense, self._layers, routings, strict=True):
            x_TD = x_TD + dense(x_TD)
            x_TD = x_TD + layer(x_TD, routing=routing)[0]
        x_TD.mean().backward()
        if self._copies is not None:
            self._copies.end_backward()
            counts = [count_choices(e, self._settings["experts"]) for e in whole]
            self._copies.end_step(torch.stack(counts))
        elapsed = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        return float(elapsed)

    def shares(self, whole: list[Tensor]) -> Shares:
        """Return what limits a step with these choices of all ranks' tokens."""
        ranks, experts = self._mesh.world_size, self._settings["experts"]
        contiguous = Placement.contiguous(experts, ranks)
        placements = [contiguous] * len(whole)
        if self._copies is not None:
            placements = self._copies.placements
        fullest = total = 0
        linked = even = 0.0
        for placement, experts_TK in zip(placements, whole, strict=True):
            counts = [count_choices(part, experts) for part in experts_TK.chunk(ranks)]
            rows_R = Traffic.of(placement, torch.stack(counts), self._topology).computed_R
            fullest, total = fullest + max(rows_R), total + sum(rows_R)
            load_E = torch.stack(counts).sum(dim=0)
            linked += link_rows(placement, load_E, self._topology)
            even += link_rows(contiguous, load_E.double().mean().expand(experts), self._topology)
        copies = sum(len(ranks_of) > 1 for p in placements for ranks_of in p.holders_E)
        return Shares(fullest * ranks / total, linked / even, copies)

    def copy_share(self) -> float:
        """Return the memory of copies over that of this rank's weights, moments and gradients."""
        own = [p for layer in self._layers for p in experts_of_layer(layer).parameters()]
        whole = sum(4 * p.numel() * p.element_size() for p in own)
        return 0.0 if self._copies is None else self._copies.num_bytes / whole


def experts_of_layer(layer: MoELayer) -> Experts:
    assert isinstance(layer.experts, Experts)
    return layer.experts


if __name__ == "__main__":
    main()
