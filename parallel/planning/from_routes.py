"""Placements from recorded routes, compared by what they would cost.

L MoE layers, E experts, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from ...moe.routes.reader import RouteFile
from .bounds import Traffic, busiest_link, copies_between_nodes, even_sources
from .materialize import CopyBudget, materialize
from .placement import Placement, Topology, check_ranks
from .replicate import replicate
from .reshard import moves, reshard
from .shadow import ShadowCosts, shadow


@dataclass(frozen=True, slots=True, eq=False)
class RecordedLoads:
    """Rows of each expert in route files of one recording."""

    early_LE: Tensor
    """int64: in the first half of the recorded steps, where plans are made."""
    late_LE: Tensor
    """int64: in the second half, where they are judged; zeros if there is one step."""
    early_steps: int
    """Steps of the first half; forwards where a model generated."""
    late_steps: int

    @classmethod
    def of(cls, files: Sequence[RouteFile]) -> "RecordedLoads":
        """Read files twice: for their steps, then for the rows of both halves.

        Raises :class:`DataError` if there are no rows.
        """
        found: set[int] = set()
        for file in files:
            for routes in file.chunks():
                found.update(routes.steps_N.tolist())
        if not found:
            raise DataError(f"{files[0].path} has no rows; record some.")
        steps = sorted(found)
        num_early = (len(steps) + 1) // 2
        header = files[0].header
        shape_LE = (len(header.moe_layers), header.num_experts)
        halves = [torch.zeros(shape_LE, dtype=torch.int64) for _ in range(2)]
        for file in files:
            for routes in file.chunks():
                is_late_N = routes.steps_N > steps[num_early - 1]
                for half, chosen_N in zip(halves, (~is_late_N, is_late_N), strict=True):
                    _count(half, torch.from_numpy(routes.experts_NLK[chosen_N]))
        return cls(halves[0], halves[1], num_early, len(steps) - num_early)


def _count(counts_LE: Tensor, experts_NLK: Tensor) -> None:
    """Add the rows of each expert in place."""
    for counts_E, experts_NK in zip(counts_LE, experts_NLK.unbind(dim=1), strict=True):
        ids = experts_NK[experts_NK >= 0].long()
        counts_E += torch.bincount(ids, minlength=len(counts_E))


@dataclass(frozen=True, slots=True)
class Plan:
    """Placements of all MoE layers, made by one method."""

    kind: str
    """``contiguous``, ``materialize``, ``hecate``, ``replicate`` or ``shadow``."""
    budget: int | None
    """Copies of experts that a rank may hold for a layer, over its share of the experts; None where
    costs decide."""
    placements_L: tuple[Placement, ...] = field(repr=False)

    @property
    def copies(self) -> list[int]:
        """The most copies that a rank holds, for each layer."""
        return [max(placement.copies_R()) for placement in self.placements_L]

    @property
    def moved(self) -> int:
        """Experts of all layers with another owner than the contiguous one."""
        first = self.placements_L[0]
        today = Placement.contiguous(first.num_experts, first.num_ranks)
        return len(moves([today] * len(self.placements_L), self.placements_L))


def make_plans(
    load_LE: Tensor,
    topology: Topology,
    copies: Sequence[int],
    shadows: tuple[ShadowCosts, int] | None = None,
) -> list[Plan]:
    """Return the plans of all methods for each number of ``copies`` on a rank, and without any.

    Replication is left out where its slots do not hold all experts.

    ``shadows`` are the costs of FasterMoE's decision and the steps that ``load_LE`` counts.
    Raises :class:`ConfigError` for more ranks than experts.
    """
    num_layers, num_experts = load_LE.shape
    check_ranks(num_experts, topology.num_ranks)
    contiguous = [Placement.contiguous(num_experts, topology.num_ranks)] * num_layers
    plans = [Plan("contiguous", 0, tuple(contiguous))]
    for number in dict.fromkeys((0, *copies)):
        budget = CopyBudget(num_experts, number)
        if number:
            copied = _with_copies(contiguous, load_LE, topology, budget)
            plans.append(Plan("materialize", number, copied))
        owners = reshard(contiguous, load_LE, topology, budget)
        copied = _with_copies(owners, load_LE, topology, budget)
        plans.append(Plan("hecate", number, copied))
        slots = min(num_experts, num_experts // topology.num_ranks + number)
        if slots * topology.num_ranks >= num_experts:
            replicated = [replicate(load_E, slots, topology) for load_E in load_LE]
            plans.append(Plan("replicate", number, tuple(replicated)))
    if shadows is not None:
        costs, steps = shadows
        shadowed = []
        for placement, load_E in zip(contiguous, load_LE, strict=True):
            counts_SE = even_sources(torch.div(load_E, steps).round(), topology.num_ranks)
            shadowed.append(shadow(placement, counts_SE, costs))
        plans.append(Plan("shadow", None, tuple(shadowed)))
    return plans


def _with_copies(
    owners: Sequence[Placement], load_LE: Tensor, topology: Topology, budget: CopyBudget
) -> tuple[Placement, ...]:
    pairs = zip(owners, load_LE, strict=True)
    return tuple(materialize(placement, load_E, topology, budget) for placement, load_E in pairs)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a plan costs for some loads, over all layers. Rows come evenly from all ranks."""

    share: float
    """The largest rank's rows over the mean, mean over layers weighted by their rows."""
    worst_share: float
    """The same of the worst layer."""
    moving: float
    """Share of rows that another rank computes."""
    crossing: float
    """Share of rows that another node computes."""
    link_rows: float
    """Rows per step that the busiest rank sends or receives in one direction, all layers."""
    node_link_rows: float
    """Of these, rows between nodes."""
    node_copies: int
    """Copies of experts that cross between nodes in a step, all layers."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def judge(plan: Plan, load_LE: Tensor, steps: int, topology: Topology) -> Judgement:
    """Return what ``plan`` costs for the loads of ``steps`` steps."""
    layers = [
        Traffic.of(placement, even_sources(load_E, topology.num_ranks), topology)
        for placement, load_E in zip(plan.placements_L, load_LE, strict=True)
    ]
    rows = max(1, int(load_LE.sum()))
    largest = sum(max(layer.computed_R) for layer in layers)
    near_and_far = [(layer.within_node_SR, layer.between_nodes_SR) for layer in layers]
    moving = sum(int(near.sum() + far.sum()) for near, far in near_and_far)
    crossing = sum(int(far.sum()) for _, far in near_and_far)
    return Judgement(
        share=largest * topology.num_ranks / rows,
        worst_share=max(layer.max_over_mean for layer in layers),
        moving=moving / rows,
        crossing=crossing / rows,
        link_rows=sum(busiest_link(near + far) for near, far in near_and_far) / max(1, steps),
        node_link_rows=sum(busiest_link(far) for _, far in near_and_far) / max(1, steps),
        node_copies=sum(copies_between_nodes(p, topology) for p in plan.placements_L),
    )
