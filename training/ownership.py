"""Experts get other owners between steps: weights, moments and gradients' room move with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError
from ..moe.config.model import LayersConfig
from ..moe.experts.resident import Experts
from ..parallel.dense.gradients import MainGradients
from ..parallel.experts.materialized import MaterializedExperts
from ..parallel.experts.moves import move_slots
from ..parallel.mesh import Mesh
from ..parallel.planning.placement import Placement
from ..parallel.planning.plan_file import read_plan
from .optimizers.optimizer import MasterOptimizer


class Ownership:
    """Moves the trained experts of a run between its ranks. Numbers do not change."""

    def __init__(
        self,
        copies: MaterializedExperts,
        optimizer: MasterOptimizer,
        gradients: MainGradients,
        group: dist.ProcessGroup,
        every: int,
    ) -> None:
        self._copies, self._optimizer, self._gradients = copies, optimizer, gradients
        self._group, self._every = group, every

    def before_step(self, step: int) -> None:
        """Move experts if it is time to; all ranks call it before step ``step`` (from 0)."""
        if self._every and step and step % self._every == 0:
            self.move_to(self._copies.better_owners())

    def move_to(self, owners: Sequence[Placement]) -> None:
        """Give every layer's experts these owners; each rank keeps its number of slots in all."""
        for number, (own, after) in enumerate(zip(self._copies.layers, owners, strict=True)):
            before = self._copies.owners[number]
            if before.owner_E != after.owner_E:
                self._move_layer(own, before, after)
        self._copies.set_owners(owners)
        self._gradients.fit_experts()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        owners = [placement.as_dict() for placement in self._copies.owners]
        return {"owners": owners, "loads": self._copies.window.counts_WLE.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the load, and the owners if there were as many ranks; weights come later."""
        loads = torch.tensor(state["loads"], dtype=torch.int64)
        if loads.numel():
            self._copies.window = self._copies.window.with_state({"counts_WLE": loads})
        owners = [Placement.from_dict(placement) for placement in state["owners"]]
        if owners[0].num_ranks == dist.get_world_size(self._group):
            self.move_to(owners)

    def _move_layer(self, own: Experts, before: Placement, after: Placement) -> None:
        parameters = [p for p in (own.fc1, own.fc2, own.fc1_bias, own.fc2_bias) if p is not None]
        states = [self._optimizer.state_of(parameter) for parameter in parameters]
        flat = [tensor for state in states for tensor in state]
        moved = iter(move_slots(flat, before, after, self._group))
        for parameter, state in zip(parameters, states, strict=True):
            self._optimizer.replace_state(parameter, tuple(next(moved) for _ in state))
        own.hold(after.owned_by(dist.get_rank(self._group)))


def planned_owners(path: Path, model: LayersConfig, mesh: Mesh) -> list[Placement]:
    """Return the owners of each layer's experts in a plan's file, which rank 0 reads for all.

    Raises, on all ranks, :class:`ConfigError` for a plan of another model or other ranks, or one
    whose ranks do not own equally many experts over all layers, and :class:`DataError` for a file
    that is no plan.
    """

    def read() -> list[tuple[int, ...]]:
        plan = read_plan(path, model, mesh.ep_size)
        owners = [layer.owner for layer in plan.layers]
        share = plan.num_experts * len(owners) // plan.ranks
        for rank in range(plan.ranks):
            owned = sum(layer.count(rank) for layer in owners)
            if owned != share:
                raise ConfigError(
                    f"{path} gives rank {rank} {owned} experts over all layers, but each rank of a "
                    f"run owns {share}; make a plan with --kind hecate."
                )
        return owners

    return [Placement.owned(mesh.ep_size, owner_E) for owner_E in mesh.on_rank_0(read)]
