"""From a run's choice to the path that all its MoE layers share.

E experts, P ranks of the expert-parallel group.
"""

from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ConfigError
from ...moe.experts.path import ExpertPath
from ..mesh import Mesh, group_of, host_of
from .all_to_all import AllToAllPath
from .exchange import Exchange, open_exchange
from .hop import Level, RankOf
from .padded import PaddedPath
from .pipelined import Degrees, PipelinedPath

PathKind = Literal["all_to_all", "all_gather", "hierarchical", "padded"]
"""How rows travel. ``all_to_all``: a copy to each rank that has an expert of the row.
``all_gather``: a copy to every rank. ``hierarchical``: a copy to each node that has one, between
ranks of equal number, and from there to the ranks of the node. ``padded``: a copy to each expert,
and as many rows for each expert as a router with a capacity may choose."""


def open_path(
    kind: PathKind,
    degrees: Degrees | None,
    num_experts: int,
    mesh: Mesh,
    ranks_per_node: int,
    timeout_s: float,
    *,
    has_copies: bool = False,
    has_lanes: bool = False,
    capacity: int | None = None,
) -> ExpertPath:
    """Return the path of a mesh with more than one expert-parallel rank; all ranks call it.

    ``degrees`` None asks for one that can cut rows into chunks, whose degrees are set later.
    ``has_copies`` asks for one whose rows may go to any holder of their experts, ``has_lanes`` for
    one that shares its links with other traffic. ``capacity`` is the most rows of a rank that an
    expert gets in training; ``padded`` needs it.
    """
    assert mesh.ep_group is not None, "one process has all experts"
    owner_of = partial(_divided, divisor=num_experts // mesh.ep_size)
    if kind == "padded":
        assert capacity is not None, "the configuration was not validated"
        return PaddedPath(num_experts, mesh, open_exchange(mesh.ep_group, mesh.ep_host), capacity)
    if kind == "hierarchical":
        levels = _two_levels(owner_of, mesh, ranks_per_node, timeout_s)
    elif mesh.ep_size > 1:
        exchange = open_exchange(mesh.ep_group, mesh.ep_host)
        is_whole = degrees is not None and degrees.chunks == 1 and mesh.expert_tp_size == 1
        if kind == "all_to_all" and is_whole and not (has_copies or has_lanes):
            return AllToAllPath(num_experts, mesh, exchange)
        to_all = kind == "all_gather"
        levels = [Level(exchange, mesh.ep_rank, mesh.ep_size, owner_of, to_all=to_all)]
    else:
        levels = []
    return PipelinedPath([*levels, *_slices(owner_of, mesh)], degrees)


def _slices(owner_of: RankOf, mesh: Mesh) -> list[Level]:
    """Return the level of ranks with slices of the same experts, if there are any."""
    if mesh.expert_tp_group is None:
        return []
    exchange = open_exchange(mesh.expert_tp_group, mesh.expert_tp_host)
    rank, size = mesh.expert_tp_rank, mesh.expert_tp_size
    return [Level(exchange, rank, size, owner_of, to_all=True, has_slices=True)]


def _two_levels(owner_of: RankOf, mesh: Mesh, ranks_per_node: int, timeout_s: float) -> list[Level]:
    """Return the level between nodes and the one inside a node."""
    size, slices = mesh.ep_size, mesh.expert_tp_size
    if ranks_per_node % slices:
        raise ConfigError(
            f"parallel.path is hierarchical and a node has {ranks_per_node} ranks, which "
            f"parallel.expert_tp = {slices} does not divide; use a divisor of {ranks_per_node}, or "
            "all_to_all."
        )
    local = min(ranks_per_node // slices, size)
    if size % local:
        raise ConfigError(
            f"parallel.path is hierarchical and a node has {ranks_per_node} ranks, which do not "
            f"divide parallel.ep = {size * slices}; use a multiple of {ranks_per_node}, or "
            "all_to_all."
        )
    node, index = divmod(mesh.ep_rank, local)
    # By copy of the experts, node, rank of the node, slice.
    ranks = torch.arange(mesh.world_size).view(-1, size // local, local, slices)
    between = _exchange(ranks.permute(0, 2, 3, 1).flatten(0, 2), mesh.rank, timeout_s)
    inside = _exchange(ranks.transpose(2, 3).flatten(0, 2), mesh.rank, timeout_s)

    return [
        Level(between, node, size // local, owner_of, lambda ranks: _divided(ranks, local)),
        Level(inside, index, local, owner_of, lambda ranks: ranks - node * local),
    ]


def _divided(numbers: Tensor, divisor: int) -> Tensor:
    return torch.div(numbers, divisor, rounding_mode="floor")


def _exchange(partition: Tensor, rank: int, timeout_s: float) -> Exchange:
    """Make all groups of a partition of the ranks, and return the exchange of this rank's."""
    group: dist.ProcessGroup = group_of(rank, partition.tolist(), timedelta(seconds=timeout_s))
    return open_exchange(group, host_of(group, timeout_s))
