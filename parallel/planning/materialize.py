"""Which experts get copies for one step, after Hecate's sparse materialization (Algorithm 1).

Copies spread the load without moving owners. They are made while other work runs and are dropped
after the step.

E experts of a layer, R ranks.
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from ...errors import ConfigError
from .apportion import replicas_for
from .dispatch import expected_loads, most_even
from .placement import Placement, Topology


@dataclass(frozen=True, slots=True)
class CopyBudget:
    """How much may be copied for a layer in a step."""

    experts: int
    """Different experts that may be copied: what travels while other work runs (Hecate's t)."""
    per_rank: int
    """Copies that a rank has memory for (Hecate's m)."""

    @classmethod
    def of_sizes(
        cls,
        expert_bytes: int,
        memory_bytes: float,
        overlap_s: float = float("inf"),
        bytes_per_s: float = float("inf"),
    ) -> Self:
        """Return the budget of a time window on a link and of a rank's memory for one layer.

        With several nodes, ``bytes_per_s`` is the speed between nodes. By default there is time for
        everything. Raises :class:`ConfigError` where memory does not hold one expert.
        """
        if memory_bytes < expert_bytes:
            raise ConfigError(
                f"the memory for copies is {memory_bytes:.0f} bytes, but one expert has "
                f"{expert_bytes}; give at least that."
            )
        per_rank = int(memory_bytes // expert_bytes)
        in_time = overlap_s * bytes_per_s / expert_bytes
        return cls(int(min(in_time, _MANY)), int(min(per_rank, _MANY)))


_MANY = 1 << 30
"""More experts than any layer has."""


def materialize(
    owners: Placement, load_E: Tensor, topology: Topology, budget: CopyBudget
) -> Placement:
    """Return ``owners`` with copies of the busiest experts.

    If a rank has memory for all of them, every rank copies each. Else the slots of all ranks are
    shared by load: the copies of an expert go to nodes without one first, then to the ranks with
    the most free slots, then to those with the least load. Experts without load are not copied.

    No rank gets more than ``budget.per_rank`` copies, and no more than ``budget.experts`` experts
    are copied. Copies can bring near rows to a rank that is already full. Where that makes the
    largest rank's share worse, there are none.
    """
    start = owners.owners_only
    busiest = _busiest(load_E, budget.experts)
    if topology.num_ranks == 1 or not busiest or not budget.per_rank:
        return start
    if len(busiest) <= budget.per_rank:
        everyone = range(topology.num_ranks)
        holders_E = [everyone if e in busiest else () for e in range(start.num_experts)]
        copied = start.with_holders(holders_E)
    else:
        copied = _by_load(start, busiest, load_E, topology, budget.per_rank)
    return most_even(load_E, topology, start, copied)


def _busiest(load_E: Tensor, number: int) -> list[int]:
    """Return the experts with the largest loads, the lower of equals first."""
    loads = load_E.double().tolist()
    ordered = sorted(range(len(loads)), key=lambda e: (-loads[e], e))
    return [expert for expert in ordered[:number] if loads[expert] > 0]


def _by_load(
    owners: Placement, busiest: list[int], load_E: Tensor, topology: Topology, per_rank: int
) -> Placement:
    """Share the slots of all ranks among ``busiest`` in proportion to their loads."""
    ranks = range(topology.num_ranks)
    loads = load_E.double().tolist()
    # An owner's copy needs no slot, so each expert starts with one.
    slots = len(busiest) + topology.num_ranks * per_rank
    replicas = replicas_for([loads[e] for e in busiest], slots, most=topology.num_ranks)
    free_R = [per_rank] * topology.num_ranks
    load_R = expected_loads(owners, load_E, topology).tolist()
    holders_E = [list(ranks_of) for ranks_of in owners.holders_E]
    for expert, number in zip(busiest, replicas, strict=True):
        holders = holders_E[expert]
        each = loads[expert] / number
        load_R[owners.owner_E[expert]] += each - loads[expert]
        while len(holders) < number:
            open_ranks = [r for r in ranks if free_R[r] and r not in holders]
            if not open_ranks:
                break
            nodes = [topology.node_of(r) for r in holders]
            rank = min(
                open_ranks,
                key=lambda r: (topology.node_of(r) in nodes, -free_R[r], load_R[r], r),
            )
            holders.append(rank)
            free_R[rank] -= 1
            load_R[rank] += each
    return owners.with_holders(holders_E)
