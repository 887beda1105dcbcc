"""k-means whose clusters have equal sizes (OneRec, Deng et al. 2025).

N points, K clusters, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..routers.assignment import balanced_assignment
from ..routers.kmeans_fit import fit_centroids, squared_distances

MOST_ROUNDS = 40
"""Rounds at most; exact ones settle after about ten."""
PATIENCE = 5
"""Rounds without a better clustering before the search ends."""
EXACT_POINTS = 1024
"""Up to so many points, a round finds the best assignment: half a second on a core. The sum of
squared distances is then about a fifth smaller than with clusters that choose in turn. Time grows
with the cube, to 11 s for 4096 points."""


class Clusters(NamedTuple):
    """A clustering of N points."""

    centroids_KD: Tensor
    """The mean of each cluster's points."""
    clusters_N: Tensor
    """int64: the cluster of each point; sizes differ by at most 1."""


def balanced_kmeans(x_ND: Tensor, num_clusters: int, seed: int) -> Clusters:
    """Cluster points into equal parts; the same seed gives the same clusters.

    There must be a point for each cluster, and all must be finite. N need not be a multiple of K:
    some clusters have one point more. The search begins with the centroids of k-means. It keeps the
    best round by the sum of squared distances, and ends when assignments stay, or when
    :data:`PATIENCE` rounds were no better.
    """
    assert 1 <= num_clusters <= len(x_ND), "the caller checks it"
    draws = torch.Generator().manual_seed(seed)
    centroids_KD = fit_centroids(x_ND, num_clusters, seed).to(x_ND.dtype)
    best, best_distance, waited = None, torch.inf, 0
    for _ in range(MOST_ROUNDS):
        if len(x_ND) <= EXACT_POINTS:
            # Squared distances as they are: their sum is what the centroids minimise.
            squares_NK = squared_distances(x_ND.double(), centroids_KD.double())
            clusters_N = balanced_assignment(-squares_NK)
        else:
            order_K = torch.randperm(num_clusters, generator=draws).tolist()
            clusters_N = _in_turn(x_ND, centroids_KD, order_K)
        if best is not None and torch.equal(clusters_N, best.clusters_N):
            break
        centroids_KD = means(x_ND, clusters_N, num_clusters)
        distance = float((x_ND - centroids_KD[clusters_N]).double().square().sum())
        waited += 1
        if distance < best_distance:
            best, best_distance, waited = Clusters(centroids_KD, clusters_N), distance, 0
        if waited == PATIENCE:
            break
    assert best is not None, "the caller checks that points are finite"
    return best


def _in_turn(x_ND: Tensor, centroids_KD: Tensor, order_K: list[int]) -> Tensor:
    """Let each cluster in turn take the free points that are nearest to it.

    Those that come early choose among more points, so callers draw another ``order_K`` each round.
    The first ones take the points that are left over by equal sizes.
    """
    clusters_N = torch.empty(len(x_ND), dtype=torch.int64)
    free_R = torch.arange(len(x_ND))
    size, larger = divmod(len(x_ND), len(order_K))
    for place, cluster in enumerate(order_K):
        distances_R = (x_ND[free_R] - centroids_KD[cluster]).square().sum(dim=1)
        nearest_R = distances_R.argsort(stable=True)
        taken = size + (place < larger)
        clusters_N[free_R[nearest_R[:taken]]] = cluster
        free_R = free_R[nearest_R[taken:].sort().values]
    return clusters_N


def means(x_ND: Tensor, clusters_N: Tensor, num_clusters: int) -> Tensor:
    """Return the mean of each cluster's points, ``[K, D]``; none is empty."""
    sums_KD = x_ND.new_zeros(num_clusters, x_ND.shape[1]).index_add_(0, clusters_N, x_ND)
    sizes_K = torch.bincount(clusters_N, minlength=num_clusters)
    return sums_KD / sizes_K[:, None]
