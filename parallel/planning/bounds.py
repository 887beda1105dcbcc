"""What a placement costs for given counts: rows on each rank, and rows that cross links.

S source ranks, R ranks that compute (the same ranks), E experts.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .dispatch import HolderTable
from .placement import Placement, Topology


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """The rows of one layer in one direction. Results come back the same way.

    A row is a choice: a token with two experts on a rank counts twice. Paths that send such a token
    once stay below these numbers.
    """

    rows_SR: Tensor
    """int64: rows of each source that each rank computes."""
    topology: Topology

    @classmethod
    def of(cls, placement: Placement, counts_SE: Tensor, topology: Topology) -> Self:
        """Return the traffic if source s has ``counts_SE[s, e]`` rows for expert e."""
        counts_SE = counts_SE.to("cpu", torch.int64)
        rows_SR = torch.stack(
            [
                HolderTable.of(placement, topology, source).rows_RE(counts_E).sum(dim=1)
                for source, counts_E in enumerate(counts_SE)
            ]
        )
        return cls(rows_SR, topology)

    @property
    def computed_R(self) -> list[int]:
        """Rows that each rank computes."""
        rows: list[int] = self.rows_SR.sum(dim=0).tolist()
        return rows

    @property
    def max_over_mean(self) -> float:
        """The largest rank's rows over the mean; 1 is perfect balance, and without rows it is 1."""
        total = int(self.rows_SR.sum())
        return max(self.computed_R) * self.topology.num_ranks / total if total else 1.0

    @property
    def within_node_SR(self) -> Tensor:
        """Rows between two ranks of a node."""
        own_SR = torch.eye(self.topology.num_ranks, dtype=torch.bool)
        return torch.where(self._same_node() & ~own_SR, self.rows_SR, 0)

    @property
    def between_nodes_SR(self) -> Tensor:
        """Rows between ranks of different nodes."""
        return torch.where(self._same_node(), 0, self.rows_SR)

    def _same_node(self) -> Tensor:
        nodes = torch.arange(self.topology.num_ranks) // self.topology.ranks_per_node
        return nodes[:, None] == nodes[None, :]


def busiest_link(rows_SR: Tensor) -> int:
    """Return the most rows that one rank sends or receives: what its link carries."""
    return int(max(rows_SR.sum(dim=1).max(), rows_SR.sum(dim=0).max()))


def copies_between_nodes(placement: Placement, topology: Topology) -> int:
    """Return the copies of experts that must cross between nodes: one for each node but the
    owner's."""
    return sum(len({topology.node_of(rank) for rank in ranks}) - 1 for ranks in placement.holders_E)


def even_sources(load_E: Tensor, num_ranks: int) -> Tensor:
    """Return ``counts_SE`` where rows come as evenly as can be from all ranks.

    What is left over of an expert goes to ranks after the one where that of the expert before
    ended, so all sources have equally many rows, to within one.
    """
    load_E = load_E.to("cpu", torch.int64)
    rest_E = load_E % num_ranks
    begins_E = rest_E.cumsum(dim=0) - rest_E
    places_SE = (torch.arange(num_ranks)[:, None] - begins_E) % num_ranks
    return torch.div(load_E, num_ranks, rounding_mode="floor") + (places_SE < rest_E)
