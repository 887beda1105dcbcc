"""The rank's side of benchmarks/peers_parity.py: the model around the MoE layer, and the protocol.

Every system's file calls :func:`serve`. It needs torch and nothing of moeyard, because a system
runs in its own Python. The driver writes one JSON object a line to every rank's standard input:

    {"do": "check", "problem": FILE, "load": "zipf", "ep": 2}    a step without clipping, one with
    {"do": "build", "problem": FILE, "load": "zipf", "ep": 2}    a system that is timed
    {"do": "steps", "count": 3}                                  seconds of one of these steps

Rank 0 answers each with one line of JSON behind ``MARK``: systems print lines of their own.

T tokens of this rank, D model width, F expert width, E experts, O outputs.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

MARK = "@@ "
UNMEASURED = 2
EXPERT_PARTS = ("gate", "up", "down")
Weights = dict[str, Tensor]
"""``dense [D, D]``, ``head [O, D]``, ``router [E, D]``, ``gate`` and ``up [E, F, D]``,
``down [E, D, F]``; of some experts only where a rank says which."""


@dataclass(frozen=True)
class Problem:
    """This rank's rows, and the weights of all experts."""

    sizes: dict[str, int]
    weights: Weights
    x_TD: Tensor
    target_TO: Tensor
    lr: float
    clip: float | None

    def experts(self, ids: range) -> Weights:
        """Return the weights of these experts."""
        return {name: self.weights[name][ids.start : ids.stop] for name in EXPERT_PARTS}


class System(Protocol):
    """A model that is ready to train."""

    def step(self) -> tuple[Tensor, float | None]:
        """Train one step. Return the loss of this rank's rows, and the norm before clipping
        if the system says it."""
        ...

    def weights(self) -> tuple[Weights, range]:
        """Return the weights that this rank has now, and which experts those are."""
        ...


Build = Callable[[Problem, int], System]
"""Makes a system from the problem and the expert-parallel degree."""


class Block(nn.Module):
    """Residual and dense layer, residual and MoE layer, linear head, mean squared error."""

    def __init__(self, problem: Problem, moe: nn.Module) -> None:
        super().__init__()
        self.dense = _linear(problem.weights["dense"])
        self.head = _linear(problem.weights["head"])
        self.moe = moe

    def forward(self, x_TD: Tensor, target_TO: Tensor) -> Tensor:
        h_TD = x_TD + self.dense(x_TD)
        h_TD = h_TD + self.moe(h_TD)
        return F.mse_loss(self.head(h_TD), target_TO)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    fill(layer.weight, weight)
    return layer


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy ``value`` into a parameter of the same shape."""
    assert parameter.shape == value.shape, f"{tuple(parameter.shape)} {tuple(value.shape)}"
    parameter.copy_(value)


def experts_of(ep: int, num_experts: int, rank: int | None = None) -> range:
    """Return the experts of a rank where ``ep`` neighbouring ranks share all of them."""
    share = num_experts // ep
    first = (dist.get_rank() if rank is None else rank) % ep * share
    return range(first, first + share)


def serve(build: Build) -> None:
    """Do what the driver says until it closes standard input."""
    torch.set_num_threads(1)
    system: System | None = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "check":
            answer = _check(build, command)
        elif command["do"] == "build":
            system = None  # frees the last one
            system = build(_load(command, clip=1.0), command["ep"])
            for _ in range(UNMEASURED):
                system.step()
        else:
            assert system is not None
            answer = _time(system, command["count"])
        if dist.get_rank() == 0:
            print(MARK + json.dumps(answer), flush=True)


def _load(command: dict[str, Any], clip: float | None) -> Problem:
    """Read a problem and take this rank's rows."""
    found = torch.load(command["problem"], weights_only=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    return Problem(
        sizes=found["sizes"],
        weights=found["weights"][command["load"]],
        x_TD=found["x"].chunk(world)[rank].contiguous(),
        target_TO=found["target"].chunk(world)[rank].contiguous(),
        lr=found["lr"],
        clip=clip,
    )


def _time(system: System, count: int) -> dict[str, float]:
    """Return the seconds of a step, until the slowest rank is done, and the CPU time of all."""
    dist.barrier()
    began, began_cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        system.step()
    cpu = torch.tensor([time.process_time() - began_cpu], dtype=torch.float64)
    dist.barrier()
    seconds = (time.perf_counter() - began) / count
    dist.all_reduce(cpu)
    return {"seconds": seconds, "cpu_seconds": float(cpu) / count}


def _check(build: Build, command: dict[str, Any]) -> dict[str, Any]:
    """Return the loss and the norm, and what a step changed, without clipping and with it."""
    truth = torch.load(command["problem"], weights_only=True)["truth"][command["load"]]
    found: dict[str, Any] = {}
    for name, clip in (("unclipped", None), ("clipped", 1.0)):
        problem = _load(command, clip)
        system = build(problem, command["ep"])
        loss, norm = system.step()
        loss = loss.detach().double().reshape(1)
        dist.all_reduce(loss)
        whole, differ = _gather(*system.weights(), problem.sizes["experts"])
        found |= {"loss": float(loss) / dist.get_world_size()}
        if norm is not None:
            found["norm"] = float(norm)
        found[name] = _errors(whole, problem, truth["gradient"], truth[f"{name}_factor"])
        found["ranks_differ"] = max(differ, found.get("ranks_differ", 0.0))
    return found


def _errors(whole: Weights, problem: Problem, gradient: Weights, factor: float) -> dict:
    """Return, for each group of weights, how far its update is off and how much too large it is."""
    groups = {"dense": ("dense", "head"), "router": ("router",), "experts": EXPERT_PARTS}
    errors = {}
    for group, names in {**groups, "all": tuple(whole)}.items():
        right = torch.cat([(-problem.lr * factor * gradient[n]).flatten() for n in names])
        old = (problem.weights[n].double() for n in names)
        change = [(whole[n].double() - before).flatten() for n, before in zip(names, old)]  # noqa: B905
        is_ = torch.cat(change)
        errors[group] = {
            "error": float((is_ - right).norm() / right.norm()),
            "size": float(is_.norm() / right.norm()),
        }
    return errors


def _gather(weights: Weights, ids: range, num_experts: int) -> tuple[Weights, float]:
    """Return all weights, and the largest difference between two ranks' copies of one."""
    parts: list[Any] = [None] * dist.get_world_size()
    mine = {name: value.detach().cpu().clone() for name, value in weights.items()}
    dist.all_gather_object(parts, (mine, ids))
    whole: dict[str, Tensor] = {}
    seen: dict[tuple[str, int], Tensor] = {}
    differ = 0.0
    for their, their_ids in parts:
        for name, value in their.items():
            is_expert = name in EXPERT_PARTS
            for key, part in zip(their_ids, value) if is_expert else [(-1, value)]:  # noqa: B905
                first = seen.setdefault((name, key), part)
                differ = max(differ, float((first - part).abs().max()))
    for name in weights:
        if name in EXPERT_PARTS:
            whole[name] = torch.stack([seen[name, e] for e in range(num_experts)])
        else:
            whole[name] = seen[name, -1]
    return whole, differ
