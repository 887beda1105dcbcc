"""Which holder of an expert computes a row: near copies first, evenly among equals (Hecate).

A rank that holds the expert keeps its rows. Else the holders of its node share them, and where the
node has none, all holders do. The j-th row of an expert on its source goes to holder
``(j + first) mod n`` of these n, so nothing depends on time or on other ranks.

T tokens, K choices, E experts, R ranks, S sources (the same ranks).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .placement import Placement, Topology


@dataclass(frozen=True, slots=True)
class HolderTable:
    """Where the rows of one source rank go; :meth:`to` brings it to the device of the rows."""

    takes_RE: Tensor
    """bool: whether a rank takes rows of an expert from this source."""
    order_RE: Tensor
    """int64: for each expert the ranks that take its rows, in rising order, then the others."""
    number_E: Tensor
    """int64: the ranks that take an expert's rows."""
    first_E: Tensor
    """int64: the place in ``order_RE`` of the rank that takes the source's first row."""

    @classmethod
    def of(cls, placement: Placement, topology: Topology, source: int) -> Self:
        """Return the table of rank ``source``."""
        assert topology.num_ranks == placement.num_ranks, "the topology of other ranks"
        holds_RE = placement.holds_RE()
        node = topology.ranks_of(topology.node_of(source))
        near_RE = torch.zeros_like(holds_RE)
        near_RE[node.start : node.stop] = holds_RE[node.start : node.stop]
        has_near_E = near_RE.any(dim=0)
        own_RE = torch.zeros_like(holds_RE)
        own_RE[source] = holds_RE[source]
        takes_RE = torch.where(has_near_E, near_RE, holds_RE)
        takes_RE = torch.where(own_RE.any(dim=0), own_RE, takes_RE)
        number_E = takes_RE.sum(dim=0)
        # Sources that share holders begin at different ones, and so do experts of one source:
        # otherwise many experts with a row each would all visit the same rank.
        rank_before = torch.where(has_near_E, source - node.start, source)
        holders_before = torch.where(
            has_near_E, near_RE[node.start : source].sum(dim=0), holds_RE[:source].sum(dim=0)
        )
        experts_E = torch.arange(placement.num_experts)
        first_E = (rank_before - holders_before + experts_E) % number_E
        order_RE = takes_RE.long().argsort(dim=0, descending=True, stable=True)
        return cls(takes_RE, order_RE, number_E, first_E)

    def to(self, device: torch.device) -> "HolderTable":
        """Return the table on another device."""
        return HolderTable(
            self.takes_RE.to(device),
            self.order_RE.to(device),
            self.number_E.to(device),
            self.first_E.to(device),
        )

    def destinations(self, experts_TK: Tensor) -> Tensor:
        """Return the rank that computes each choice, ``[T, K]`` int64; -1 where the expert is -1.

        Rows of an expert are numbered by token, then by choice. Nothing waits for a GPU.
        """
        flat = experts_TK.reshape(-1).long()
        expert = flat.clamp(min=0)
        order = flat.argsort(stable=True)
        ordered = flat[order]
        numbers = torch.arange(flat.numel(), device=flat.device)
        starts = torch.searchsorted(ordered, ordered)
        row = torch.empty_like(flat).index_copy_(0, order, numbers - starts)
        place = (row + self.first_E[expert]) % self.number_E[expert]
        rank = torch.where(flat >= 0, self.order_RE[place, expert], -1)
        return rank.view(experts_TK.shape)

    def rows_RE(self, counts_E: Tensor) -> Tensor:
        """Return the rows of this source that each rank computes for each expert.

        They are those of :meth:`destinations` where the source has ``counts_E`` rows.
        """
        place_RE = self.takes_RE.long().cumsum(dim=0) - 1
        extra_RE = (place_RE - self.first_E) % self.number_E < counts_E % self.number_E
        rows_RE = torch.div(counts_E, self.number_E, rounding_mode="floor") + extra_RE
        return torch.where(self.takes_RE, rows_RE, 0)


def shares_RE(placement: Placement, topology: Topology) -> Tensor:
    """Return the share of an expert's rows that a rank computes if every rank sends equally many.

    float64; each column sums to 1. It is the mean of all sources' tables.
    """
    holds_RE = placement.holds_RE().double()
    size = topology.ranks_per_node
    near_NE = holds_RE.view(topology.num_nodes, size, -1).sum(dim=1)
    far_E = size * (near_NE == 0).sum(dim=0) / holds_RE.sum(dim=0)
    near_RE = near_NE.repeat_interleave(size, dim=0).clamp(min=1)
    return holds_RE * (size / near_RE + far_E) / topology.num_ranks


def expected_loads(placement: Placement, load_E: Tensor, topology: Topology) -> Tensor:
    """Return the rows that each rank computes, ``[R]`` float64, if sources send equally many."""
    return shares_RE(placement, topology) @ load_E.double()


def largest_share(placement: Placement, load_E: Tensor, topology: Topology) -> float:
    """Return the largest rank's rows over the mean of all ranks; 1 is perfect balance."""
    load_R = expected_loads(placement, load_E, topology)
    total = float(load_R.sum())
    return float(load_R.max()) * topology.num_ranks / total if total else 1.0


def most_even(load_E: Tensor, topology: Topology, *placements: Placement) -> Placement:
    """Return the placement with the smallest largest share, the first of equals."""
    shares = [round(largest_share(p, load_E, topology), 12) for p in placements]
    return placements[shares.index(min(shares))]
