"""k-means: centroids of rows, by Lloyd's steps from far-apart starts (k-means++).

N rows, D width, C clusters, n rows of a chunk.
"""

import torch
from torch import Tensor

from ...errors import ConfigError

MOST_STEPS = 50
"""Lloyd's steps at most; a few dozen settle all but a handful of rows."""
CHUNK_ROWS = 4096
"""Rows whose distances are in memory at a time."""


def fit_centroids(rows_ND: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Return fp64 ``[C, D]`` on the rows' device: the means of C clusters.

    Deterministic for a seed. A cluster that loses all its rows keeps its mean. Raises
    :class:`ConfigError` for fewer rows than clusters.
    """
    if len(rows_ND) < num_clusters:
        raise ConfigError(
            f"there are {len(rows_ND)} rows for {num_clusters} clusters; give more rows."
        )
    rows_ND = rows_ND.detach().double()
    generator = torch.Generator().manual_seed(seed)
    centroids_CD = _far_apart(rows_ND, num_clusters, generator)
    clusters_N = nearest(rows_ND, centroids_CD)
    for _ in range(MOST_STEPS):
        centroids_CD = _means(rows_ND, clusters_N, centroids_CD)
        before_N, clusters_N = clusters_N, nearest(rows_ND, centroids_CD)
        if torch.equal(before_N, clusters_N):
            break
    return centroids_CD


def squared_distances(rows_ND: Tensor, centroids_CD: Tensor) -> Tensor:
    """Return ``[N, C]``; 0 where rounding makes a distance negative."""
    products_NC = rows_ND @ centroids_CD.T
    norms_N1 = rows_ND.square().sum(dim=1, keepdim=True)
    return (norms_N1 - 2 * products_NC + centroids_CD.square().sum(dim=1)).clamp(min=0)


def nearest(rows_ND: Tensor, centroids_CD: Tensor) -> Tensor:
    """Return int64 ``[N]``: the nearest centroid of each row; ties go to the lower number."""
    parts = [
        squared_distances(rows_nD.double(), centroids_CD).argmin(dim=1)
        for rows_nD in rows_ND.split(CHUNK_ROWS)
    ]
    return torch.cat(parts)


def _far_apart(rows_ND: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Draw rows, each with a probability of its squared distance to those drawn so far."""
    picks = [int(torch.randint(len(rows_ND), (), generator=generator))]
    closest_N = torch.full((len(rows_ND),), torch.inf, dtype=torch.float64)
    for _ in range(1, num_clusters):
        distance_N = (rows_ND - rows_ND[picks[-1]]).square().sum(dim=1).cpu()
        closest_N = torch.minimum(closest_N, distance_N)
        total = float(closest_N.sum())
        if total == 0:  # fewer different rows than clusters
            picks.append(len(picks))
            continue
        mark = float(torch.rand((), generator=generator, dtype=torch.float64)) * total
        picks.append(min(int((closest_N.cumsum(0) <= mark).sum()), len(rows_ND) - 1))
    return rows_ND[picks].clone()


def _means(rows_ND: Tensor, clusters_N: Tensor, before_CD: Tensor) -> Tensor:
    sums_CD = torch.zeros_like(before_CD).index_add(0, clusters_N, rows_ND)
    sizes_C = torch.bincount(clusters_N, minlength=len(before_CD))
    means_CD = sums_CD / sizes_C.clamp(min=1).unsqueeze(1)
    return torch.where((sizes_C > 0).unsqueeze(1), means_CD, before_CD)
