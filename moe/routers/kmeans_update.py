"""Online k-means over the global batch: integer sums, so any number of ranks moves alike.

T tokens, D model width, E centroids.
"""

import torch
from torch import Tensor

STEPS = 2.0**28
"""Steps of a fixed-point value, 4e-9; sums of a step may be as large as 3e10."""
SPLIT = 1 / 1024
"""Centroids that share tokens move apart by this part of their values (as faiss does)."""


def sums_of_members(x_TD: Tensor, nearest_T: Tensor, num_experts: int) -> Tensor:
    """Return int64 ``[E, D]``: the summed rows of each centroid in fixed point; -1 = of none.

    Rows are rounded, and sums are exact: they do not depend on the order of rows and ranks.
    """
    rows_TD = (x_TD.detach().double() * STEPS).round().long()
    rows_TD = torch.where((nearest_T >= 0).unsqueeze(1), rows_TD, 0)
    sums_ED = rows_TD.new_zeros(num_experts, x_TD.shape[1])
    return sums_ED.index_add_(0, nearest_T.clamp(min=0), rows_TD)


def sums_to_means(sums_ED: Tensor, members_E: Tensor) -> Tensor:
    """Return fp64 ``[E, D]``: the mean row of each centroid, 0 without rows."""
    return sums_ED.double() / STEPS / members_E.clamp(min=1).unsqueeze(1)


def moved(centroids_ED: Tensor, means_ED: Tensor, members_E: Tensor, rate: float) -> Tensor:
    """Return centroids that went the part ``rate`` of the way; those without rows stay."""
    means_ED = torch.where((members_E > 0).unsqueeze(1), means_ED, centroids_ED.double())
    return torch.lerp(centroids_ED.double(), means_ED, rate).to(centroids_ED.dtype)


def reseed(centroids_ED: Tensor, idle_steps_E: Tensor, members_E: Tensor, after: int) -> None:
    """Give idle centroids half of the tokens of the busiest ones, in place.

    Both get the busy one's place, with even coordinates a little larger in one and odd ones in the
    other. The next idle one then takes from the busiest of what is left.
    """
    load = members_E.tolist()
    for idle in (idle_steps_E >= after).nonzero().flatten().tolist():
        busiest = max(range(len(load)), key=load.__getitem__)
        if load[busiest] < 2:
            return
        signs_D = torch.ones_like(centroids_ED[idle])
        signs_D[1::2] = -1
        centroids_ED[idle] = centroids_ED[busiest] * (1 + SPLIT * signs_D)
        centroids_ED[busiest] *= 1 - SPLIT * signs_D
        load[idle] = load[busiest] // 2
        load[busiest] -= load[idle]
        idle_steps_E[idle] = 0
