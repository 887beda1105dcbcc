"""A rank of benchmarks/peers_parity.py: moeyard. ``python peers_parity_ours.py [sockets | bf16]``.

``sockets``: no memory shared by ranks. ``bf16``: the layer under autocast, as torchtitan has it.
"""

import dataclasses
import os
import sys

import torch
import torch.distributed as dist
from peers_parity_case import Block, Problem, Weights, fill, serve
from torch import Tensor, nn

import moeyard
from moeyard.moe.experts.resident import Experts
from moeyard.moe.layer import MoELayer
from moeyard.parallel.dense.table import open_engine
from moeyard.parallel.experts.open_path import open_path
from moeyard.parallel.experts.pipelined import Degrees
from moeyard.parallel.mesh import build_mesh
from moeyard.parallel.process import process_group
from moeyard.training.run.allocator import keep_freed_memory

LIMIT_S = 300


class _Output(nn.Module):
    """The layer without its routing."""

    def __init__(self, layer: MoELayer, in_bf16: bool) -> None:
        super().__init__()
        self.layer = layer
        self._in_bf16 = in_bf16

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._in_bf16):
            y_TD: Tensor = self.layer(x_TD)[0]
        return y_TD.to(x_TD.dtype)


class Ours:
    """MoELayer, its expert path and main gradients, as a run puts them together."""

    def __init__(self, problem: Problem, ep: int, option: str) -> None:
        sizes = problem.sizes
        mesh = build_mesh(ep, sizes["experts"], None, LIMIT_S)
        if option == "sockets":
            mesh = dataclasses.replace(mesh, dp_host=None, ep_host=None, edp_host=None)
        self._ids = mesh.local_experts(sizes["experts"])
        self._layer = MoELayer(
            sizes["width"],
            sizes["inner"],
            sizes["experts"],
            moeyard.TopK(k=2, balance_loss=0.0),
            expert_ids=self._ids,
        )
        local = problem.experts(self._ids)
        fill(self._layer.gate.weight, problem.weights["router"])
        fill(self._experts.fc1, torch.cat([local["gate"], local["up"]], dim=1))
        fill(self._experts.fc2, local["down"])
        if ep > 1:
            self._layer.path = open_path(
                "all_to_all", Degrees(), sizes["experts"], mesh, ep, LIMIT_S
            )
        self._model = Block(problem, _Output(self._layer, option == "bf16"))
        self._problem = problem
        self._engine = open_engine("ddp", mesh)
        self._engine.place(self._model, torch.device("cpu"))
        self._run = self._engine.wrap(self._model, self._model, torch.float32, torch.device("cpu"))
        self._sgd = torch.optim.SGD(self._model.parameters(), lr=problem.lr, fused=True)

    @property
    def _experts(self) -> Experts:
        assert isinstance(self._layer.experts, Experts)
        return self._layer.experts

    def step(self) -> tuple[Tensor, float]:
        gradients = self._engine.gradients
        gradients.zero()
        loss = self._run(self._problem.x_TD, self._problem.target_TO)
        self._engine.backward(loss / dist.get_world_size())
        gradients.reduce()
        norm = gradients.norm()
        if self._problem.clip is not None:
            gradients.scale_((self._problem.clip / (norm + 1e-6)).clamp(max=1.0))
        for parameter in self._model.parameters():
            parameter.grad = parameter.main_grad
        self._sgd.step()
        self._sgd.zero_grad()
        return loss, float(norm)

    def weights(self) -> tuple[Weights, range]:
        gate, up = self._experts.fc1.chunk(2, dim=1)
        return {
            "dense": self._model.dense.weight,
            "head": self._model.head.weight,
            "router": self._layer.gate.weight,
            "gate": gate,
            "up": up,
            "down": self._experts.fc2,
        }, self._ids


if __name__ == "__main__":
    os.environ.setdefault("TORCHELASTIC_RUN_ID", "peers")
    keep_freed_memory()
    with process_group(LIMIT_S):
        serve(lambda problem, ep: Ours(problem, ep, sys.argv[1]))
