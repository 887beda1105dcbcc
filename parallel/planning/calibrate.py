"""Copies only where they save more time than they cost, after Hecate's calibration.

Which experts get copies is up to :func:`~moeyard.parallel.planning.materialize.materialize`. How
many of them is tried here: none, and powers of two up to the budget.

E experts of a layer, R ranks.
"""

from dataclasses import dataclass

from torch import Tensor

from .cost_model import Linear
from .dispatch import shares_RE
from .materialize import CopyBudget, materialize
from .placement import Placement, Topology


@dataclass(frozen=True, slots=True)
class CopyCosts:
    """Seconds of what a layer does in a step, as one rank sees it."""

    row_s: float
    """Forward and backward of a row through an expert."""
    link_row_s: float
    """A row over the busiest link: out and back, in forward and in backward."""
    gather: Linear
    """Weights of n experts to all ranks."""
    reduce: Linear
    """Gradients of n experts back to their owners."""
    contention: float
    """How much longer copies and experts take while both are at work; see :class:`CostModel`."""
    gathers: int = 1
    """Times that weights travel in a step: once, or twice a micro-batch to save memory."""
    reduces: int = 1

    def seconds(self, placement: Placement, load_E: Tensor, topology: Topology) -> float:
        """Return the time of a layer for the expected ``load_E`` rows of all ranks.

        Rows travel and are computed in turn. Copies travel while experts compute.
        """
        shares = shares_RE(placement, topology)
        compute_s = self.row_s * float((shares @ load_E.double()).max())
        link_s = self.link_row_s * link_rows(placement, load_E, topology)
        copied = sum(placement.copies_R()) / max(1, topology.num_ranks - 1)
        copies_s = self.gathers * self.gather.seconds(copied)
        copies_s += self.reduces * self.reduce.seconds(copied)
        shorter_s, longer_s = sorted((compute_s, copies_s))
        return link_s + longer_s + self.contention * shorter_s


def calibrate(
    owners: Placement, load_E: Tensor, topology: Topology, budget: CopyBudget, costs: CopyCosts
) -> Placement:
    """Return ``owners`` with the number of copied experts that makes the layer fastest.

    Among equals, it copies fewer.
    """
    most = min(budget.experts, owners.num_experts)
    numbers = sorted({most, *(1 << power for power in range(most.bit_length() - 1))})
    tried = [materialize(owners, load_E, topology, CopyBudget(n, budget.per_rank)) for n in numbers]
    return min(
        [owners.owners_only, *tried], key=lambda found: costs.seconds(found, load_E, topology)
    )


def link_rows(placement: Placement, load_E: Tensor, topology: Topology) -> float:
    """Return the rows that the busiest link carries one way, if all ranks have equal loads.

    With several nodes, links are those between them, in rows for each rank of a node. Else they are
    those of the ranks.
    """
    size = topology.ranks_per_node if topology.num_nodes > 1 else 1
    places = topology.num_ranks // size
    holds_PE = placement.holds_RE().view(places, size, -1).any(dim=1)
    computed_PE = shares_RE(placement, topology).view(places, size, -1).sum(dim=1)
    own_E = load_E.double() / places  # what a place brings
    arrive_P = (computed_PE * load_E - holds_PE * own_E).sum(dim=1)
    leave_P = (~holds_PE * own_E).sum(dim=1)
    return float(max(arrive_P.max(), leave_P.max())) / size
