"""Which rank owns which expert, over all layers together (Hecate's Algorithm 2), and the moves.

A rank may own any number of a layer's experts. Over all layers, ranks own equally many, to within
one, so that parameters and optimizer state take the same memory everywhere.

L MoE layers, E experts per layer, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .dispatch import expected_loads
from .materialize import CopyBudget, materialize
from .placement import Placement, Topology


@dataclass(frozen=True, slots=True)
class Move:
    """An expert's parameters and optimizer state go from one rank to another."""

    layer: int
    """Number among the MoE layers."""
    expert: int
    source: int
    destination: int


def moves(before: Sequence[Placement], after: Sequence[Placement]) -> list[Move]:
    """Return what changes its owner between the placements of all layers."""
    return [
        Move(layer, expert, source, destination)
        for layer, (old, new) in enumerate(zip(before, after, strict=True))
        for expert, (source, destination) in enumerate(zip(old.owner_E, new.owner_E, strict=True))
        if source != destination
    ]


def reshard(
    current: Sequence[Placement], load_LE: Tensor, topology: Topology, budget: CopyBudget
) -> list[Placement]:
    """Return owners for all layers, without copies; ``current`` where they are no better.

    Better means fewer rows on the fullest rank, summed over layers, once :func:`materialize` has
    made the copies that ``budget`` allows. The busiest experts, which all ranks may copy, do not
    need a good owner: they fill the slots that are left. Where memory allows few copies, they may
    need one after all, so owners are also chosen as if there were no copies.
    """
    best = [placement.owners_only for placement in current]
    least = _cost(best, load_LE, topology, budget)
    for copied in dict.fromkeys((min(budget.experts, budget.per_rank, load_LE.shape[1]), 0)):
        found = _shard(load_LE, topology, copied)
        cost = _cost(found, load_LE, topology, budget)
        if cost < least - 1e-9 * least:
            best, least = found, cost
    return best


def _cost(
    owners: Sequence[Placement], load_LE: Tensor, topology: Topology, budget: CopyBudget
) -> float:
    """Return the rows of the fullest rank with copies, summed over layers."""
    total = 0.0
    for placement, load_E in zip(owners, load_LE, strict=True):
        copied = materialize(placement, load_E, topology, budget)
        total += float(expected_loads(copied, load_E, topology).max())
    return total


def _shard(load_LE: Tensor, topology: Topology, copied: int) -> list[Placement]:
    """Place all but each layer's ``copied`` busiest experts, busiest layer first; then those."""
    num_layers, num_experts = load_LE.shape
    loads = load_LE.double().tolist()
    sorted_experts = [sorted(range(num_experts), key=lambda e: (-row[e], e)) for row in loads]
    rest = [order[copied:] for order in sorted_experts]
    layers = sorted(
        range(num_layers), key=lambda i: (-max((loads[i][e] for e in rest[i]), default=0.0), i)
    )
    slots = _Slots(num_layers * num_experts, topology)
    owners = [[0] * num_experts for _ in range(num_layers)]
    load_LR = [[0.0] * topology.num_ranks for _ in range(num_layers)]
    for experts_L in (rest, [order[:copied] for order in sorted_experts]):
        for layer in layers:
            for expert in experts_L[layer]:
                rank = slots.take(load_LR[layer])
                owners[layer][expert] = rank
                load_LR[layer][rank] += loads[layer][expert]
    return [Placement.owned(topology.num_ranks, owner_E) for owner_E in owners]


class _Slots:
    """The free slots of ranks, over all layers."""

    def __init__(self, total: int, topology: Topology) -> None:
        each, more = divmod(total, topology.num_ranks)
        self._free = [each + (rank < more) for rank in range(topology.num_ranks)]
        self._topology = topology

    def take(self, load_R: Sequence[float]) -> int:
        """Take a slot on the least loaded node with one, there on the least loaded rank.

        Among equals, the one with fewer free slots: it then gets few but busy experts.
        """
        nodes = []
        for node in range(self._topology.num_nodes):
            ranks = self._topology.ranks_of(node)
            free = sum(self._free[r] for r in ranks)
            if free:
                nodes.append((sum(load_R[r] for r in ranks), free, node))
        ranks = self._topology.ranks_of(min(nodes)[2])
        rank = min((load_R[r], self._free[r], r) for r in ranks if self._free[r])[2]
        self._free[rank] -= 1
        return rank
