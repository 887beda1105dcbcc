"""The process mesh: dense and expert dimensions folded independently over the same ranks.

Dense parameters are replicated over ``dp`` = all ranks. Experts are split over ``ep`` neighbouring
ranks and replicated over ``edp`` = world / ep (Megatron's parallel folding).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where this process stands; groups are None on one process."""

    rank: int = 0
    world_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    dp_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None

    def local_experts(self, num_experts: int) -> range:
        """Return the logical experts this rank holds."""
        share = num_experts // self.ep_size
        return range(self.ep_rank * share, (self.ep_rank + 1) * share)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place; the identity on one process."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.dp_group is not None:
            dist.barrier(group=self.dp_group)


def check_expert_parallel(ep_size: int, world_size: int, num_experts: int) -> None:
    """Refuse expert-parallel degrees that do not divide the ranks or the experts."""
    if world_size % ep_size:
        raise ConfigError(
            f"parallel.ep is {ep_size}, which does not divide the {world_size} rank(s); "
            f"start torchrun with a multiple of {ep_size} processes or lower parallel.ep."
        )
    if num_experts % ep_size:
        raise ConfigError(
            f"parallel.ep is {ep_size}, which does not divide model.moe.num_experts = "
            f"{num_experts}; choose a divisor of {num_experts}."
        )


def build_mesh(ep_size: int, num_experts: int) -> Mesh:
    """Fold the ranks of the running process group; refuse degrees that do not divide."""
    if not dist.is_initialized():
        check_expert_parallel(ep_size, 1, num_experts)
        return Mesh()
    world = dist.get_world_size()
    check_expert_parallel(ep_size, world, num_experts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = init_device_mesh(device, (world,), mesh_dim_names=("dp",))
    expert = init_device_mesh(device, (world // ep_size, ep_size), mesh_dim_names=("edp", "ep"))
    return Mesh(
        rank=dist.get_rank(),
        world_size=world,
        ep_rank=expert.get_local_rank("ep"),
        ep_size=ep_size,
        dp_group=dense.get_group("dp"),
        ep_group=expert.get_group("ep"),
        edp_group=expert.get_group("edp"),
    )
