"""Spread the load by replicas of the busiest experts, after DeepSeek's EPLB.

Every rank holds equally many experts. Load alone decides: nothing here knows what a move costs.
Unlike EPLB, a rank never holds one expert twice, which would leave a slot without use.

E experts, R ranks.
"""

from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError
from .apportion import replicas_for
from .dispatch import most_even
from .pack import balanced_packs
from .placement import Placement, Topology, check_ranks


def replicate(
    load_E: Tensor, slots_per_rank: int, topology: Topology, num_groups: int = 1
) -> Placement:
    """Return a placement with at most ``slots_per_rank`` experts on each rank.

    Where the nodes divide ``num_groups``, groups of neighbouring experts are packed onto nodes, and
    each node replicates its own: rows of a group then stay on one node. Else all ranks are alike.
    The owner of an expert is one of its holders, so that ranks own about equally many. Never less
    even than :meth:`Placement.contiguous`.

    Raises :class:`ConfigError` for slots or groups that do not fit.
    """
    num_experts = load_E.numel()
    _check(num_experts, slots_per_rank, topology, num_groups)
    loads = load_E.double().tolist()
    in_groups = num_groups > 1 and num_groups % topology.num_nodes == 0
    domains = topology.num_nodes if in_groups else 1
    size = num_experts // num_groups
    groups = [range(group * size, (group + 1) * size) for group in range(num_groups)]
    group_loads = [sum(loads[expert] for expert in group) for group in groups]
    packs = balanced_packs(group_loads, range(num_groups), domains, num_groups // domains)
    ranks_of_domain = topology.num_ranks // domains
    holders_E: list[list[int]] = [[] for _ in range(num_experts)]
    for domain, pack in enumerate(packs):
        experts = sorted(expert for group in pack for expert in groups[group])
        held = _spread([loads[e] for e in experts], ranks_of_domain, slots_per_rank)
        for rank, positions in enumerate(held):
            for position in positions:
                holders_E[experts[position]].append(domain * ranks_of_domain + rank)
    owners = _owners(holders_E, topology.num_ranks)
    found = Placement.owned(topology.num_ranks, owners).with_holders(holders_E)
    return most_even(load_E, topology, found, Placement.contiguous(num_experts, topology.num_ranks))


def _spread(loads: Sequence[float], num_ranks: int, slots_per_rank: int) -> list[list[int]]:
    """Return the experts of each rank, all alike."""
    replicas_E = replicas_for(loads, num_ranks * slots_per_rank, most=num_ranks)
    experts = [expert for expert, count in enumerate(replicas_E) for _ in range(count)]
    weights = [loads[expert] / replicas_E[expert] for expert in experts]
    packs = balanced_packs(weights, experts, num_ranks, slots_per_rank)
    return [sorted(experts[item] for item in pack) for pack in packs]


def _owners(holders_E: Sequence[Sequence[int]], num_ranks: int) -> list[int]:
    """Choose owners among holders: experts with few holders first, each rank as little as can."""
    owned = [0] * num_ranks
    owner_E = [0] * len(holders_E)
    for expert in sorted(range(len(holders_E)), key=lambda e: (len(holders_E[e]), e)):
        rank = min(holders_E[expert], key=lambda r: (owned[r], r))
        owner_E[expert] = rank
        owned[rank] += 1
    return owner_E


def _check(num_experts: int, slots_per_rank: int, topology: Topology, num_groups: int) -> None:
    check_ranks(num_experts, topology.num_ranks)
    fewest = -(-num_experts // topology.num_ranks)
    if not fewest <= slots_per_rank <= num_experts:
        raise ConfigError(
            f"the slots of a rank are {slots_per_rank}, but {num_experts} experts on "
            f"{topology.num_ranks} rank(s) need {fewest} to {num_experts}."
        )
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(
            f"the number of groups is {num_groups}, which does not divide the {num_experts} "
            f"experts; use a divisor of {num_experts}."
        )
