"""An MoE layer's experts on paper: what travels, the path and the chunks that are fastest.

T tokens, K choices, D model width, E experts, P expert-parallel ranks, N nodes they are on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..planning.cost_model import FREE, CostModel
from ..planning.pipeline import DEGREES, LayerWork, plan_layer, ranked_degrees
from ..planning.schedule import Timeline
from .choices import Array, Choices
from .compute import Compute
from .links import Links
from .workload import Group, Path

WEIGHT_AND_ID = 4
"""Bytes that travel with a row for each choice, on average over four ways: an fp32 weight and an
int32 expert there in forward, nothing back, nothing there in backward, a gradient back."""


@dataclass(frozen=True, slots=True)
class Travel:
    """The rows of the busiest rank, which the others wait for, in one direction of a layer."""

    rows: float
    """Routed rows that it computes."""
    copies: float
    """Copies of rows that arrive at it, those from itself included."""
    node_copies: float
    """Copies that arrive from the ranks of equal number on each node, for the hierarchical path."""
    card_copies: float
    """Copies for each rank of those that share the busiest network card."""

    @classmethod
    def of(
        cls, choices: Choices, shares_RE: Array, tokens: int, per_node: int, per_card: int = 1
    ) -> "Travel":
        """Return the travel of ranks with ``tokens`` each.

        ``shares_RE`` says which rank computes which share of an expert's rows. Of the ``per_node``
        ranks of a node, ``per_card`` share a network card.
        """
        num_ranks = len(shares_RE)
        loads_R = shares_RE @ choices.visits_E()
        shares_NE = shares_RE.reshape(num_ranks // per_node, per_node, -1).sum(axis=1)
        visits_R, visits_N = choices.visits_R(shares_RE), choices.visits_R(shares_NE)
        # Cards whose ranks do not fill them evenly count as those of one rank each.
        per_card = per_card if num_ranks % per_card == 0 else 1
        visits_C = visits_R.reshape(-1, per_card).mean(axis=1)
        return cls(
            rows=float(num_ranks * tokens * loads_R.max()),
            copies=float(num_ranks * tokens * visits_R.max()),
            node_copies=float(len(shares_NE) * tokens * visits_N.max()),
            card_copies=float(num_ranks * tokens * visits_C.max()),
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """A path with its chunks, and the time of both directions."""

    path: Path
    forward_chunks: int
    backward_chunks: int
    forward: Timeline
    backward: Timeline
    serial_s: float
    """Of forward, in addition: the exchange of how many rows travel."""
    packing_s: float
    """Of each direction, in addition: packing copies of rows and adding up their results."""
    copies: float
    """Copies of rows that the busiest rank sends or gets, those to itself included."""
    model: CostModel
    work: LayerWork

    @property
    def seconds(self) -> float:
        """Both directions."""
        return self.forward.seconds + self.backward.seconds + self.serial_s + 2 * self.packing_s

    @property
    def exposed_s(self) -> tuple[float, float]:
        """Forward and backward: the time in which the rank does not compute."""
        return (
            self.forward.seconds - self.forward.busy_s("compute") + self.serial_s,
            self.backward.seconds - self.backward.busy_s("compute"),
        )

    @property
    def link_s(self) -> tuple[float, float]:
        """Forward and backward: the time in which the links between nodes carry rows."""
        return self.forward.busy_s("inter"), self.backward.busy_s("inter")


@dataclass(frozen=True, slots=True)
class Layer:
    """An MoE layer of a run, on one rank of P."""

    compute: Compute
    links: Links
    travel: Travel
    beside_s: float = 0.0
    """Forward of the shared expert."""
    capacity_rows: float | None = None
    """Rows that a rank sends with the padded path."""

    def schedule(self) -> Schedule:
        """Return what the run would do: the path and chunks it names, or the fastest for auto."""
        work = self.compute.work
        kinds: tuple[Path, ...] = (work.path,) if work.path != "auto" else ("all_to_all",)
        ep = self.compute.fold.ep
        if work.path == "auto" and 1 < ep.per_node < ep.size:
            kinds = ("all_to_all", "hierarchical")
        if work.chunks != "auto":
            return self.with_chunks(kinds[0], work.chunks, work.backward_chunks or work.chunks)
        degrees = [d for d in DEGREES if d <= max(1, self.compute.fold.tokens)]
        found = [self.fastest(kind, degrees) for kind in kinds]
        return min([self.with_chunks(kinds[0], 1, 1), *found], key=lambda s: s.seconds)

    def fastest(self, kind: Path, degrees: Sequence[int] = DEGREES) -> Schedule:
        """Return a path with the chunks that planning ranks first."""
        first = ranked_degrees(self.model(kind), self.layer_work(kind), degrees)[0]
        return self.with_chunks(kind, first.forward, first.backward)

    def model(self, kind: Path) -> CostModel:
        """Return the cost model of a path, as a run would measure it."""
        fold, links = self.compute.fold, self.links
        ep = fold.ep
        shared = self.travel.card_copies / self.travel.copies if self.travel.copies else 1.0
        first, second = links.all_to_all(ep, shared if kind == "all_to_all" else 1.0), FREE
        back = second
        if kind == "hierarchical":
            first = links.all_to_all(Group(ep.nodes, 1))
            second = back = links.all_to_all(Group(ep.per_node, ep.per_node))
        if fold.expert_tp.size > 1:
            second, back = links.all_gather(fold.expert_tp), links.reduce_scatter(fold.expert_tp)
        experts, backward = self.compute.expert_lines(self.travel.rows)
        return CostModel(
            dispatch=first,
            gather=second,
            experts=experts,
            experts_backward=backward,
            scatter=back,
            combine=first,
            gradients=links.all_reduce(fold.world),
            contention=self.compute.cluster.contention,
        )

    def layer_work(self, kind: Path) -> LayerWork:
        """Return what planning needs to know of a path's rows."""
        fold = self.compute.fold
        copies = self.copies(kind)
        inside = 0.0
        if kind == "hierarchical":
            inside = self.travel.copies
        if fold.expert_tp.size > 1:
            inside = copies * fold.expert_tp.size
        beside_s = self.beside_s if self._has_lanes(kind) else 0.0
        size = self.row_bytes
        return LayerWork(copies * size, self.travel.rows, inside * size, beside_s)

    def copies(self, kind: Path) -> float:
        """Return the copies of rows that the busiest rank sends or gets on a path's first level."""
        fold = self.compute.fold
        if kind == "all_gather":
            return float(fold.tokens * fold.ep.size)
        if kind == "padded":
            assert self.capacity_rows is not None, "the configuration was not validated"
            return self.capacity_rows
        return self.travel.node_copies if kind == "hierarchical" else self.travel.copies

    @property
    def row_bytes(self) -> float:
        """Bytes of a copy of a row on its way, on average."""
        work = self.compute.work
        assert work.model.moe is not None
        k = work.model.moe.router.k
        return work.model.d_model * work.item_bytes + WEIGHT_AND_ID * k

    def _has_lanes(self, kind: Path) -> bool:
        """Whether a shared expert is computed while rows travel (open_path.py)."""
        work = self.compute.work
        asked = (work.chunks, work.backward_chunks or work.chunks)
        return kind != "padded" and (kind != "all_to_all" or asked != (1, 1))

    def with_chunks(self, kind: Path, forward: int, backward: int) -> Schedule:
        """Return a path with these chunks."""
        model, work = self.model(kind), self.layer_work(kind)
        there, back = priced_timelines(model, work, forward, backward)
        fold, copies = self.compute.fold, self.copies(kind)
        counts = self.links.all_gather(fold.ep).alpha
        if kind == "hierarchical":
            counts = self.links.all_gather(Group(fold.ep.nodes, 1)).alpha
            counts += self.links.all_gather(Group(fold.ep.per_node, fold.ep.per_node)).alpha
        if kind == "padded" or fold.ep.size == 1:
            counts = 0.0
        size = fold.ep.size
        packing = 0.0 if size * fold.expert_tp.size == 1 else self.compute.path_s(copies)
        return Schedule(kind, forward, backward, there, back, counts, packing, copies, model, work)


def priced_timelines(
    model: CostModel, work: LayerWork, forward: int, backward: int
) -> tuple[Timeline, Timeline]:
    """Return both directions; they share the pieces that experts compute, as in planning."""
    pieces = int(np.lcm(forward, backward))
    there = plan_layer(model, work, forward, calls=pieces // forward)
    back = plan_layer(model, work, backward, backward=True, calls=pieces // backward)
    return there, back
