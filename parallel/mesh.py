"""The process mesh: dense and expert dimensions folded independently over the same ranks.

Dense parameters are replicated over ``dp`` = all ranks. The inner width of experts is split over
``expert_tp`` neighbouring ranks, experts are split over ``ep`` such groups, and replicated over
``edp`` = world / (ep * expert_tp) (Megatron's parallel folding and expert tensor parallelism).
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
    dp_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None
    expert_tp_group: dist.ProcessGroup | None = None
    """None also where expert_tp is 1."""
    experts_group: dist.ProcessGroup | None = None
    """The ranks that together have each expert once: ep * expert_tp neighbours."""
    dp_host: HostGroup | None = None
    """The ranks of ``dp_group`` where they share memory: all on this host, on the CPU."""
    ep_host: HostGroup | None = None
    edp_host: HostGroup | None = None
    expert_tp_host: HostGroup | None = None
    watch: Watch | None = None

    def local_experts(self, num_experts: int) -> range:
        """Return the logical experts this rank holds."""
        share = num_experts // self.ep_size
        return range(self.ep_rank * share, (self.ep_rank + 1) * share)

    @property
    def groups_sharing_memory(self) -> str:
        """Names of the groups that use shared memory; the others use gloo or NCCL."""
        hosts = {"dp": self.dp_host, "ep": self.ep_host, "edp": self.edp_host}
        hosts["expert_tp"] = self.expert_tp_host
        return ",".join(name for name, host in hosts.items() if host is not None) or "none"

    @pulse.in_collective("the sum of losses and counts")
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place; the identity on one process."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the element-wise maximum of ``tensor`` over all ranks, in place."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.dp_group)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.dp_group is not None:
            dist.barrier(group=self.dp_group)

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
    ep_size: int, world_size: int, num_experts: int, expert_tp: int = 1
) -> None:
    """Refuse expert-parallel degrees that do not divide the ranks or the experts."""
    together = ep_size * expert_tp
    if world_size % together and expert_tp > 1:
        raise ConfigError(
            f"parallel.ep = {ep_size} times parallel.expert_tp = {expert_tp} is {together}, which "
            f"does not divide the {world_size} rank(s); start a multiple of {together} processes "
            "or lower one of them."
        )
    if world_size % ep_size:
        raise ConfigError(
            f"parallel.ep is {ep_size}, which does not divide the {world_size} rank(s); "
            f"start a multiple of {ep_size} processes or lower parallel.ep."
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
) -> Mesh:
    """Fold the ranks of the running process group, if any; refuse degrees that do not divide.

    ``watch`` is the group's; ``timeout_s`` bounds the collectives of all groups made here.
    """
    if not dist.is_initialized():
        check_expert_parallel(ep_size, 1, num_experts, expert_tp)
        return Mesh()
    world, rank = dist.get_world_size(), dist.get_rank()
    check_expert_parallel(ep_size, world, num_experts, expert_tp)
    ranks = torch.arange(world).view(-1, ep_size, expert_tp)
    timeout = timedelta(seconds=timeout_s)
    dp_group = dist.group.WORLD
    assert dp_group is not None
    ep_group = group_of(rank, ranks.transpose(1, 2).flatten(0, 1).tolist(), timeout)
    edp_group = group_of(rank, ranks.flatten(1).T.tolist(), timeout)
    expert_tp_group, experts_group = None, ep_group
    if expert_tp > 1:
        expert_tp_group = group_of(rank, ranks.flatten(0, 1).tolist(), timeout)
        experts_group = group_of(rank, ranks.flatten(1).tolist(), timeout)
    return Mesh(
        rank=rank,
        world_size=world,
        ep_rank=rank // expert_tp % ep_size,
        ep_size=ep_size,
        expert_tp_rank=rank % expert_tp,
        expert_tp_size=expert_tp,
        dp_group=dp_group,
        ep_group=ep_group,
        edp_group=edp_group,
        expert_tp_group=expert_tp_group,
        experts_group=experts_group,
        dp_host=host_of(dp_group, timeout_s),
        ep_host=host_of(ep_group, timeout_s),
        edp_host=host_of(edp_group, timeout_s),
        expert_tp_host=None if expert_tp_group is None else host_of(expert_tp_group, timeout_s),
        watch=watch,
    )


def group_of(rank: int, partition: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """Make all groups of a partition (every rank must) and return this rank's."""
    groups = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in partition]
    return next(group for ranks, group in groups if rank in ranks)


def host_of(group: dist.ProcessGroup, timeout_s: float) -> HostGroup | None:
    if dist.get_world_size(group) == 1 or torch.cuda.is_available():
        return None
    return HostGroup.join(group, timeout_s)
