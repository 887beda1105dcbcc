"""Which experts are worth a copy on every rank, after FasterMoE's dynamic shadowing.

The decision takes the true counts of a step, so it is made after routing. A shadowed expert's rows
stay where they are. Its parameters go to all ranks, and its gradients come back.

S source ranks, R ranks that compute (the same ranks), E experts, N experts shadowed.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .placement import Placement


@dataclass(frozen=True, slots=True)
class ShadowCosts:
    """Seconds of a layer's training step: ``3 compute + 4 transfer + shadowed experts``."""

    row_compute_s: float
    """Forward of one row through an expert; backward takes twice that."""
    row_transfer_s: float
    """One row over a rank's link, in one direction; a step sends a row four times: out and back,
    in forward and in backward."""
    expert_s: float
    """An expert's parameters to all ranks, and its gradients back."""

    @classmethod
    def of_sizes(
        cls,
        d_model: int,
        d_expert: int,
        flops_per_s: float,
        bytes_per_s: float,
        matrices: int = 3,
        bytes_per_value: int = 2,
    ) -> Self:
        """Return the costs of experts with ``matrices`` of ``[d_expert, d_model]``."""
        values = matrices * d_model * d_expert
        return cls(
            row_compute_s=2 * values / flops_per_s,
            row_transfer_s=d_model * bytes_per_value / bytes_per_s,
            expert_s=2 * values * bytes_per_value / bytes_per_s,
        )


def shadow(owners: Placement, counts_SE: Tensor, costs: ShadowCosts) -> Placement:
    """Return ``owners`` with the busiest N experts on all ranks, for the N with the least time.

    The experts are tried in the order of their rows, busiest first. FasterMoE stops at the first
    one that does not pay and forgets that each rank then computes its own rows of the shadowed
    ones. Here they count, and all N are tried.
    """
    seconds_N, order = shadow_seconds(owners, counts_SE, costs)
    best = int(seconds_N.argmin())  # the first of equals: the fewest
    chosen = set(order[:best])
    everyone = range(owners.num_ranks)
    return owners.owners_only.with_holders(
        [everyone if e in chosen else () for e in range(owners.num_experts)]
    )


def shadow_seconds(
    owners: Placement, counts_SE: Tensor, costs: ShadowCosts
) -> tuple[Tensor, list[int]]:
    """Return the seconds with the first N = 0..E experts of the order shadowed, and the order.

    The fullest rank sets the time to compute, and the one that receives most the time to send.
    """
    counts_SE = counts_SE.to("cpu", torch.int64)
    num_experts, num_ranks = owners.num_experts, owners.num_ranks
    order_E = counts_SE.sum(dim=0).argsort(descending=True, stable=True)
    owner_E = torch.tensor(owners.owner_E)[order_E]
    ordered_SE = counts_SE[:, order_E]
    rows_RE = torch.zeros(num_ranks, num_experts, dtype=torch.int64)
    rows_RE[owner_E, torch.arange(num_experts)] = ordered_SE.sum(dim=0)
    own_RE = torch.where(rows_RE > 0, ordered_SE, 0)  # of the owner itself
    nothing_R1 = torch.zeros(num_ranks, 1, dtype=torch.int64)

    def without_first(values_RE: Tensor) -> Tensor:
        """Return the sums over experts from N on, ``[R, N]``."""
        removed = torch.cat([nothing_R1, values_RE.cumsum(dim=1)], dim=1)
        return values_RE.sum(dim=1, keepdim=True) - removed

    local_RN = torch.cat([nothing_R1, ordered_SE.cumsum(dim=1)], dim=1)
    computed_N = (without_first(rows_RE) + local_RN).max(dim=0).values.double()
    received_N = without_first(rows_RE - own_RE).max(dim=0).values.double()
    shadowed_N = torch.arange(num_experts + 1).double()
    seconds_N = (
        3 * costs.row_compute_s * computed_N
        + 4 * costs.row_transfer_s * received_N
        + costs.expert_s * shadowed_N
    )
    return seconds_N, order_E.tolist()
