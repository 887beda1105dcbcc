"""A rank of benchmarks/gradient_partition.py: steps of a stack, with gradients sent in four ways.

python gradient_partition_case.py SETTINGS_JSON

Rank 0 prints one line of JSON for each number of chunks.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moeyard
from moeyard.moe.layer import MoELayer
from moeyard.moe.routers.routing import Routing, count_choices
from moeyard.parallel.dense.replicated import Replicated
from moeyard.parallel.experts.open_path import open_path
from moeyard.parallel.experts.pipelined import Degrees, PipelinedPath
from moeyard.parallel.mesh import Mesh, build_mesh
from moeyard.parallel.process import process_group
from moeyard.parallel.profiling.gradient_slices import GradientSlices

from skew import experts_of

LIMIT_S = 120
CPU = torch.device("cpu")
ARMS = ("at the end", "ddp", "at once", "slices", "auto")
QUEUED = {"at the end": "at the end", "at once": "at once", "slices": "planned"}
"""What the queue is told; ``auto`` chooses after it has tried."""


def main() -> None:
    settings = json.loads(sys.argv[1])
    with process_group(LIMIT_S) as watch:
        mesh = build_mesh(dist.get_world_size(), settings["experts"], watch, LIMIT_S)
        for chunks in settings["chunks"]:
            found = measure(settings, chunks, mesh)
            if mesh.rank == 0:
                print(json.dumps({"chunks": chunks} | found), flush=True)
            mesh.barrier()


def measure(settings: dict, chunks: int, mesh: Mesh) -> dict:
    """Return the seconds of every step of every arm, interleaved."""
    runs = {arm: Run(settings, chunks, mesh, arm) for arm in ARMS}
    for arm in ("slices", "auto"):
        while runs[arm].is_measuring():
            runs[arm].step()
    runs["slices"].keep()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(settings["unmeasured"] + settings["steps"]):
        first = number % len(ARMS)  # so that no arm always follows the same one
        for arm in (*ARMS[first:], *ARMS[:first]):
            elapsed = runs[arm].step()
            if number >= settings["unmeasured"]:
                seconds[arm].append(elapsed)
    return {
        "seconds": seconds,
        "gradient_bytes": runs["slices"].gradient_bytes,
        "slices": runs["slices"].plan(),
        "auto": runs["auto"].plan()["way"],
    }


class Block(nn.Module):
    """A dense MLP, which stands for attention and has its gradients, and an MoE layer."""

    def __init__(self, settings: dict, mesh: Mesh, number: int) -> None:
        super().__init__()
        width, inner, experts = (settings[name] for name in ("width", "dense", "experts"))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.moe = MoELayer(
            width,
            settings["inner"],
            experts,
            moeyard.TopK(k=settings["k"]),
            expert_ids=mesh.local_experts(experts),
        )
        self.moe.gate.requires_grad_(False)
        tokens = settings["tokens"]
        whole = experts_of(
            "uniform", 0, tokens * mesh.world_size, experts, settings["k"], seed=number
        )
        self._experts_TK = whole[mesh.rank * tokens : (mesh.rank + 1) * tokens]

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD + self.down(nn.functional.gelu(self.up(x_TD)))
        return x_TD + self.moe(x_TD, routing=self._routing())[0]

    def _routing(self) -> Routing:
        experts_TK = self._experts_TK
        weights_TK = torch.full(experts_TK.shape, 1 / experts_TK.shape[1], requires_grad=True)
        counts_E = count_choices(experts_TK, self.moe.gate.num_experts)
        return Routing(experts_TK, weights_TK, counts_E, torch.tensor(len(experts_TK)))


class Run:
    """A stack of blocks, its path to the experts, and its dense engine."""

    def __init__(self, settings: dict, chunks: int, mesh: Mesh, arm: str) -> None:
        torch.manual_seed(0)
        self._mesh = mesh
        is_queued = arm != "ddp"
        blocks = [Block(settings, mesh, number) for number in range(settings["blocks"])]
        model = nn.Sequential(*blocks)
        path = open_path(
            "all_to_all",
            Degrees(chunks, chunks),
            settings["experts"],
            mesh,
            int(os.environ["LOCAL_WORLD_SIZE"]),
            LIMIT_S,
            has_lanes=is_queued,
        )
        for block in blocks:
            block.moe.path = path
        self._engine = Replicated(mesh, has_queue=is_queued)
        self._wrapped = self._engine.wrap(model, model, torch.float32, CPU)
        self._slices, self._is_kept = None, False
        if arm in ("slices", "auto"):
            assert self._engine.queue is not None and isinstance(path, PipelinedPath)
            self._slices = GradientSlices(self._engine.queue, [path], mesh, CPU)
        elif is_queued:
            assert self._engine.queue is not None
            self._engine.queue.way = QUEUED[arm]
        self._x_TD = torch.randn(settings["tokens"], settings["width"], requires_grad=True)

    @property
    def gradient_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._engine.gradients.dense)

    def is_measuring(self) -> bool:
        """Whether the way to send gradients is not chosen yet."""
        assert self._slices is not None
        return self._slices.trials is None or self._slices.trials.best is None

    def keep(self) -> None:
        """Send as planned from now on, whatever was faster."""
        assert self._engine.queue is not None
        self._engine.queue.way, self._is_kept = "planned", True

    def plan(self) -> dict:
        """Return where slices travel, and what the plan expects of backward."""
        assert self._slices is not None and self._slices.partition is not None
        assert self._engine.queue is not None
        stages = self._slices.stages
        return self._slices.record() | {
            "way": self._engine.queue.way,
            "predicted_s": self._slices.partition.seconds,
            "moe_s": [stage.options[0].seconds for stage in stages[1::2]],
            "link_s": [stage.options[0].busy_s for stage in stages[1::2]],
            "dense_s": [stage.options[0].seconds for stage in stages[2::2]],
            "bytes": self._slices.partition.bytes_by_stage,
        }

    def step(self) -> float:
        """Run forward, backward and sum dense gradients; return the slowest rank's seconds."""
        self._engine.gradients.zero()
        self._mesh.barrier()
        began = time.perf_counter()
        self._engine.backward(self._wrapped(self._x_TD).mean())
        elapsed = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        if self._slices is not None and not self._is_kept:
            self._slices.after_step()
        return float(elapsed)


if __name__ == "__main__":
    main()
