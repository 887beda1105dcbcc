"""Which rank writes which tensors of a checkpoint, and copies of them in host memory.

torch.distributed.checkpoint plans a save: each rank lists its tensors, and rank 0 gives a tensor
that several ranks hold to one of them. The plan holds until some rank lists other tensors, so it is
kept, and only what a rank writes is copied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.utils import _DistWrapper

from ...parallel.mesh import Mesh
from .dcp_reader import HonestWriter

WAIT = timedelta(days=1)
"""How long a rank waits for another one's files. The watch finds ranks that are dead or silent, and
each rank finds files of its own that take no more (writer.py)."""


def open_ranks(mesh: Mesh) -> _DistWrapper:
    """Return what the ranks agree over: a group that only saves use.

    A thread that writes may so wait for other ranks while training runs its own collectives. All
    ranks call this.
    """
    if mesh.dp_group is None:
        return _DistWrapper(None, use_dist=False, coordinator_rank=0)
    group = dist.new_group(backend="gloo", timeout=WAIT)
    return _DistWrapper(group, use_dist=True, coordinator_rank=0)


@dataclass(frozen=True)
class Part:
    """What this rank writes."""

    plan: SavePlan
    metadata: Metadata | None
    """What the whole checkpoint holds; on rank 0."""


class Parts:
    """The plan of who writes what, kept for as long as all ranks have the same tensors."""

    def __init__(self, ranks: _DistWrapper) -> None:
        self._ranks = ranks
        self._listed: SavePlan | None = None
        self._part: Part | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> tuple[Part, DefaultSavePlanner]:
        """Return this rank's part, and a planner that knows its values; all ranks call this."""
        planner = DefaultSavePlanner()
        planner.set_up_planner(dict(tensors), is_coordinator=self._ranks.is_coordinator)
        listed = planner.create_local_plan()
        is_new = listed != self._listed
        if self._part is None or any(self._ranks.all_gather("compare", lambda: is_new)):
            self._part = self._agree(planner, listed)
            self._listed = listed
        return self._part, planner

    def _agree(self, planner: DefaultSavePlanner, listed: SavePlan) -> Part:
        metadata: Metadata | None = None

        def give_out(plans: list[SavePlan]) -> list[SavePlan]:
            nonlocal metadata
            plans, metadata = planner.create_global_plan(plans)
            return HonestWriter("").prepare_global_plan(plans)

        given = self._ranks.reduce_scatter("plan", lambda: listed, give_out)
        return Part(planner.finish_plan(given), metadata)


class HostCopies:
    """Copies of what this rank writes, in host memory that the next save uses again."""

    def __init__(self) -> None:
        self._copies: dict[MetadataIndex, Tensor] = {}
        self._arrival: torch.cuda.Event | None = None

    def take(self, plan: SavePlan, planner: DefaultSavePlanner) -> None:
        """Copy the values of now.

        Copies from a GPU are in order with its later work, so no one has to wait for them here.
        """
        copies = {}
        for item in plan.items:
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor), item
            copy = self._room(item.index, value)
            copies[item.index] = copy.copy_(value.detach(), non_blocking=True)
        self._copies = copies
        if torch.cuda.is_available():
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def wait(self) -> None:
        """Wait until the copies have arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()

    def resolve_data(self, item: WriteItem) -> Tensor:
        """Return the copy that DCP asks for when it writes."""
        return self._copies[item.index]

    def _room(self, index: MetadataIndex, value: Tensor) -> Tensor:
        room = self._copies.get(index)
        if room is not None and room.shape == value.shape and room.dtype == value.dtype:
            return room
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
