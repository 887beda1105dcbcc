"""From a run's options to the copies of its busy experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from ...errors import ConfigError
from ...moe.experts.resident import Experts
from ...moe.layer import MoELayer
from ..mesh import Mesh, group_of
from ..planning.load_window import LoadWindow
from ..planning.materialize import CopyBudget
from ..planning.placement import Placement, Topology
from .materialized import MaterializedExperts
from .materialized_path import MaterializedPath
from .pipelined import PipelinedPath
from .sparse_collectives import SparseCollectives


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """The ``parallel.copies`` section of a run."""

    max_bytes: int
    experts: int | None
    rematerialize: bool
    window: int


def open_copies(
    layers: Sequence[MoELayer],
    mesh: Mesh,
    topology: Topology,
    options: CopyOptions,
    timeout_s: float,
) -> MaterializedExperts:
    """Let the layers' busy experts have copies; all ranks call it, after gradients are attached.

    Raises :class:`ConfigError` if the memory does not hold one copy of each layer.
    """
    experts = [_plain(layer) for layer in layers]
    num_experts = experts[0].num_experts
    num_slots = _slots(experts, options, num_experts)
    ranks = torch.arange(mesh.world_size).view(-1, mesh.ep_size).tolist()
    group = group_of(mesh.rank, ranks, timedelta(seconds=timeout_s))
    owners = Placement.contiguous(num_experts, mesh.ep_size)
    copies = MaterializedExperts(
        experts,
        [owners for _ in experts],
        topology,
        SparseCollectives(group),
        CopyBudget(experts=options.experts or num_experts, per_rank=num_slots),
        LoadWindow.empty(len(experts), num_experts, options.window),
        options.rematerialize,
    )
    for number, layer in enumerate(layers):
        assert isinstance(layer.path, PipelinedPath), "copies need a pipelined path"
        layer.path = MaterializedPath(layer.path, copies, number)
    return copies


def _plain(layer: MoELayer) -> Experts:
    assert isinstance(layer.experts, Experts), "training has its experts in memory"
    return layer.experts


def _slots(experts: Sequence[Experts], options: CopyOptions, most: int) -> int:
    """Return how many copies of a layer fit; ``most`` are of use."""
    first = experts[0]
    numel = sum(p[0].numel() for p in first.parameters())
    width = first.fc1.element_size() + torch.promote_types(first.fc1.dtype, torch.float32).itemsize
    buffers = min(2, len(experts)) if options.rematerialize else len(experts)
    slots = options.max_bytes // (numel * width * buffers)
    if slots == 0:
        raise ConfigError(
            f"parallel.copies.max_bytes is {options.max_bytes}, but one copy of an expert in "
            f"{buffers} layers with its gradient takes {numel * width * buffers} bytes; raise it "
            "or set parallel.copies.rematerialize."
        )
    return min(slots, most)
