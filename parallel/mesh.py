"""The process mesh: stages of layers, and in each the same ranks folded for dense and expert parts.

Layers are split over ``pp`` stages of neighbouring ranks. Within a stage, dense parameters are
replicated over ``dp`` = all its ranks. The inner width of experts is split over ``expert_tp``
neighbouring ranks, experts are split over ``ep`` such groups, and replicated over ``edp`` =
dp / (ep * expert_tp) (Megatron's parallel folding and expert tensor parallelism).
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .host.group import HostGroup
from .watch.pulse import pulse
from .watch.watch import Answer, Watch


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among the ranks; groups and watch are None on one process."""

    rank: int = 0
    world_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    expert_tp_rank: int = 0
    expert_tp_size: int = 1
    pp_rank: int = 0
    """The number of this rank's stage."""
    pp_size: int = 1
    all_group: dist.ProcessGroup | None = None
    """All ranks."""
    dp_group: dist.ProcessGroup | None = None
    """The ranks of this stage. They share a batch, and hold the same layers."""
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None
    expert_tp_group: dist.ProcessGroup | None = None
    """None also where expert_tp is 1."""
    experts_group: dist.ProcessGroup | None = None
    """The ranks that together have each expert of a layer once: ep * expert_tp neighbours."""
    pp_group: dist.ProcessGroup | None = None
    """A rank of each stage, with the same rows: those through which a row travels. None also where
    pp is 1."""
    ends_group: dist.ProcessGroup | None = None
    """The ranks of ``pp_group`` in the first and in the last stage; None in the others."""
    dp_host: HostGroup | None = None
    """The ranks of ``dp_group`` where they share memory: all on this host, on the CPU."""
    ep_host: HostGroup | None = None
    edp_host: HostGroup | None = None
    expert_tp_host: HostGroup | None = None
    watch: Watch | None = None

    @property
    def dp_size(self) -> int:
        """The number of ranks of a stage."""
        return self.world_size // self.pp_size

    @property
    def dp_rank(self) -> int:
        """This rank's place in its stage, and so which rows of a batch it has."""
        return self.rank % self.dp_size

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last layers."""
        return self.pp_rank == self.pp_size - 1

    def local_experts(self, num_experts: int) -> range:
        """Return the logical experts of each layer that this rank holds."""
        share = num_experts // self.ep_size
        return range(self.ep_rank * share, (self.ep_rank + 1) * share)

    def local_layers(self, num_layers: int) -> range:
        """Return the layers of this rank's stage."""
        share = num_layers // self.pp_size
        return range(self.pp_rank * share, (self.pp_rank + 1) * share)

    @property
    def groups_sharing_memory(self) -> str:
        """Names of the groups that use shared memory; the others use gloo or NCCL."""
        hosts = {"dp": self.dp_host, "ep": self.ep_host, "edp": self.edp_host}
        hosts["expert_tp"] = self.expert_tp_host
        return ",".join(name for name, host in hosts.items() if host is not None) or "none"

    @pulse.in_collective("the sum of losses and counts")
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place; the identity on one process."""
        if self.all_group is not None:
            dist.all_reduce(tensor, group=self.all_group)
        return tensor

    @pulse.in_collective("the sum of losses and counts")
    def sum_of_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over the ranks of this stage, in place."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    @pulse.in_collective("the gathering of counts of all stages")
    def of_all_stages(self, items: list[Any]) -> list[Any]:
        """Return the items of all stages in order, from those of this one; any Python values."""
        if self.pp_group is None:
            return items
        stages: list[Any] = [None] * self.pp_size
        dist.all_gather_object(stages, items, group=self.pp_group)
        return [item for stage in stages for item in stage]

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the element-wise maximum of ``tensor`` over all ranks, in place."""
        if self.all_group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.all_group)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.all_group is not None:
            dist.barrier(group=self.all_group)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's JSON value on rank 0, in rank order; elsewhere nothing."""
        return [value] if self.watch is None else self.watch.gather(value)

    def on_rank_0(self, action: Callable[[], Answer]) -> Answer:
        """Run ``action`` on rank 0; the others wait for as long as rank 0 makes progress.

        Every rank returns the action's result, which must be a JSON value. A
        :class:`MoeyardError` of rank 0 is raised on every rank.
        """
        if self.watch is None:
            return action()
        return self.watch.on_rank_0(action)


def check_expert_parallel(
    ep_size: int, world_size: int, num_experts: int, expert_tp: int = 1, pp_size: int = 1
) -> None:
    """Refuse degrees that do not divide the ranks, the ranks of a stage, or the experts."""
    if world_size % pp_size:
        raise ConfigError(
            f"parallel.pp is {pp_size}, which does not divide the {world_size} rank(s); start a "
            f"multiple of {pp_size} processes or lower parallel.pp."
        )
    ranks, together = world_size // pp_size, ep_size * expert_tp
    found = f"the {ranks} rank(s)" + (f" of each of {pp_size} stages" if pp_size > 1 else "")
    if ranks % together and expert_tp > 1:
        raise ConfigError(
            f"parallel.ep = {ep_size} times parallel.expert_tp = {expert_tp} is {together}, which "
            f"does not divide {found}; start a multiple of {together * pp_size} processes "
            "or lower one of them."
        )
    if ranks % ep_size:
        raise ConfigError(
            f"parallel.ep is {ep_size}, which does not divide {found}; "
            f"start a multiple of {ep_size * pp_size} processes or lower parallel.ep."
        )
    if num_experts % ep_size:
        raise ConfigError(
            f"parallel.ep is {ep_size}, which does not divide model.moe.num_experts = "
            f"{num_experts}; choose a divisor of {num_experts}."
        )


def build_mesh(
    ep_size: int,
    num_experts: int,
    watch: Watch | None = None,
    timeout_s: float = 300,
    *,
    expert_tp: int = 1,
    pp: int = 1,
) -> Mesh:
    """Fold the ranks of the running process group, if any; refuse degrees that do not divide.

    ``watch`` is the group's; ``timeout_s`` bounds the collectives of all groups made here.
    """
    if not dist.is_initialized():
        check_expert_parallel(ep_size, 1, num_experts, expert_tp, pp)
        return Mesh()
    world, rank = dist.get_world_size(), dist.get_rank()
    check_expert_parallel(ep_size, world, num_experts, expert_tp, pp)
    ranks = torch.arange(world).view(pp, -1, ep_size, expert_tp)
    timeout = timedelta(seconds=timeout_s)
    all_group = dp_group = dist.group.WORLD
    pp_group, ends_group = None, None
    if pp > 1:
        of_stage = ranks.flatten(1)
        dp_group = group_of(rank, of_stage.tolist(), timeout)
        pp_group = group_of(rank, of_stage.T.tolist(), timeout)
        ends_group = group_if_any(rank, of_stage[[0, -1]].T.tolist(), timeout)
    assert dp_group is not None
    ep_group = group_of(rank, ranks.transpose(2, 3).flatten(0, 2).tolist(), timeout)
    edp_group = group_of(rank, ranks.flatten(2).transpose(1, 2).flatten(0, 1).tolist(), timeout)
    expert_tp_group, experts_group = None, ep_group
    if expert_tp > 1:
        expert_tp_group = group_of(rank, ranks.flatten(0, 2).tolist(), timeout)
        experts_group = group_of(rank, ranks.flatten(2).flatten(0, 1).tolist(), timeout)
    return Mesh(
        rank=rank,
        world_size=world,
        ep_rank=rank // expert_tp % ep_size,
        ep_size=ep_size,
        expert_tp_rank=rank % expert_tp,
        expert_tp_size=expert_tp,
        pp_rank=rank // (world // pp),
        pp_size=pp,
        all_group=all_group,
        dp_group=dp_group,
        ep_group=ep_group,
        edp_group=edp_group,
        expert_tp_group=expert_tp_group,
        experts_group=experts_group,
        pp_group=pp_group,
        ends_group=ends_group,
        dp_host=host_of(dp_group, timeout_s),
        ep_host=host_of(ep_group, timeout_s),
        edp_host=host_of(edp_group, timeout_s),
        expert_tp_host=None if expert_tp_group is None else host_of(expert_tp_group, timeout_s),
        watch=watch,
    )


def group_of(rank: int, partition: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """Make all groups of a partition (every rank must) and return this rank's."""
    group = group_if_any(rank, partition, timeout)
    assert group is not None, "a partition has every rank"
    return group


def group_if_any(
    rank: int, groups: list[list[int]], timeout: timedelta
) -> dist.ProcessGroup | None:
    """Make groups (every rank must) and return this rank's; None if it is in none of them."""
    made = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in groups]
    return next((group for ranks, group in made if rank in ranks), None)


def host_of(group: dist.ProcessGroup, timeout_s: float) -> HostGroup | None:
    if dist.get_world_size(group) == 1 or torch.cuda.is_available():
        return None
    return HostGroup.join(group, timeout_s)
