"""Which rank owns an expert, and which ranks hold a copy of it in a step.

E experts of one MoE layer, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ...errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks on nodes: rank r is on node ``r // ranks_per_node``.

    Raises :class:`ConfigError` where the ranks do not fill their nodes.
    """

    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ConfigError(f"the number of ranks is {self.num_ranks}; use 1 or more.")
        if self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node:
            raise ConfigError(
                f"the ranks of a node are {self.ranks_per_node}, which does not divide the "
                f"{self.num_ranks} rank(s); use a divisor of {self.num_ranks}."
            )

    @classmethod
    def one_node(cls, num_ranks: int) -> Self:
        """Return ``num_ranks`` ranks with equal links between all of them."""
        return cls(num_ranks, num_ranks)

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return self.num_ranks // self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """Return the node of a rank."""
        return rank // self.ranks_per_node

    def ranks_of(self, node: int) -> range:
        """Return the ranks of a node."""
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)


@dataclass(frozen=True, slots=True)
class Placement:
    """The experts of one MoE layer on ranks.

    Raises :class:`ConfigError` where an expert has no owner or its owner holds no copy. A rank may
    own any number of experts, from none to all.
    """

    num_ranks: int
    owner_E: tuple[int, ...]
    """The one rank with an expert's parameters and optimizer state."""
    holders_E: tuple[tuple[int, ...], ...]
    """The ranks that hold an expert in a step, in rising order; its owner is one of them."""

    def __post_init__(self) -> None:
        if len(self.owner_E) != len(self.holders_E):
            raise ConfigError(
                f"the placement has owners of {len(self.owner_E)} experts and holders of "
                f"{len(self.holders_E)}; give both for each expert."
            )
        for expert, (owner, holders) in enumerate(zip(self.owner_E, self.holders_E, strict=True)):
            if list(holders) != sorted(set(holders)):
                raise ConfigError(
                    f"the holders of expert {expert} are {list(holders)}; name each rank once, in "
                    "rising order."
                )
            outside = [rank for rank in (*holders, owner) if not 0 <= rank < self.num_ranks]
            if outside:
                raise ConfigError(
                    f"expert {expert} is on rank {outside[0]}, but there are {self.num_ranks} "
                    f"rank(s); use 0 to {self.num_ranks - 1}."
                )
            if owner not in holders:
                raise ConfigError(
                    f"expert {expert} belongs to rank {owner}, which is not among its holders "
                    f"{list(holders)}; add it."
                )

    @classmethod
    def owned(cls, num_ranks: int, owner_E: Sequence[int]) -> Self:
        """Return a placement where only owners hold experts."""
        return cls(num_ranks, tuple(owner_E), tuple((owner,) for owner in owner_E))

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Self:
        """Return neighbouring experts on a rank, as many on each as the numbers allow.

        Where ``num_ranks`` divides ``num_experts``, the owner of e is ``e // (E / R)``.
        """
        check_ranks(num_experts, num_ranks)
        return cls.owned(num_ranks, [e * num_ranks // num_experts for e in range(num_experts)])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the placement that :meth:`as_dict` wrote; raise :class:`ConfigError` if bad."""
        try:
            holders = tuple(tuple(int(rank) for rank in ranks) for ranks in values["holders"])
            owners = tuple(int(rank) for rank in values["owner"])
            num_ranks = int(values["ranks"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the placement is damaged ({type(error).__name__}: {error}); make the plan again."
            ) from None
        return cls(num_ranks, owners, holders)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and checkpoints."""
        holders = [list(ranks) for ranks in self.holders_E]
        return {"ranks": self.num_ranks, "owner": list(self.owner_E), "holders": holders}

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.owner_E)

    @property
    def owners_only(self) -> "Placement":
        """The same owners without copies."""
        return Placement.owned(self.num_ranks, self.owner_E)

    def with_holders(self, holders_E: Sequence[Sequence[int]]) -> "Placement":
        """Return the same owners with other holders, in any order; owners are added."""
        merged = (
            tuple(sorted({owner, *ranks}))
            for owner, ranks in zip(self.owner_E, holders_E, strict=True)
        )
        return Placement(self.num_ranks, self.owner_E, tuple(merged))

    def owned_by(self, rank: int) -> list[int]:
        """Return the experts that a rank owns."""
        return [expert for expert, owner in enumerate(self.owner_E) if owner == rank]

    def owned_by_rank(self) -> list[list[int]]:
        """Return the experts that each rank owns."""
        return [self.owned_by(rank) for rank in range(self.num_ranks)]

    def held_by(self, rank: int) -> list[int]:
        """Return the experts that a rank computes in a step."""
        return [expert for expert, ranks in enumerate(self.holders_E) if rank in ranks]

    def copies_R(self) -> list[int]:
        """Return how many experts each rank holds that it does not own."""
        copies = [-self.owner_E.count(rank) for rank in range(self.num_ranks)]
        for ranks in self.holders_E:
            for rank in ranks:
                copies[rank] += 1
        return copies

    def holds_RE(self) -> Tensor:
        """Return a bool tensor: which rank holds which expert."""
        holds_RE = torch.zeros(self.num_ranks, self.num_experts, dtype=torch.bool)
        experts = [expert for expert, ranks in enumerate(self.holders_E) for _ in ranks]
        holds_RE[[rank for ranks in self.holders_E for rank in ranks], experts] = True
        return holds_RE


def check_ranks(num_experts: int, num_ranks: int) -> None:
    """Raise :class:`ConfigError` unless each rank can have an expert."""
    if not 1 <= num_ranks <= num_experts:
        raise ConfigError(
            f"the number of ranks is {num_ranks}, but a layer has {num_experts} expert(s); use 1 "
            f"to {num_experts} ranks."
        )
