"""Semantic ids: an item as the codes of its embedding, level by level.

N items, L levels, K codes per level, D width.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import ConfigError, DataError
from ...files import replaced
from ..routers.kmeans_fit import nearest
from .balanced_kmeans import balanced_kmeans

NAME = "codebooks_LKD"


class Codebooks:
    """L codebooks of K centroids, each for what the levels before it leave of an embedding."""

    def __init__(self, codebooks_LKD: Tensor) -> None:
        self.codebooks_LKD = codebooks_LKD

    @property
    def width(self) -> int:
        """The width of embeddings."""
        return self.codebooks_LKD.shape[2]

    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the codes of embeddings, int64 ``[N, L]``: the nearest centroid on each level.

        This is how items get ids that the codebooks were not made from. Their codes are not
        balanced. Of equally near centroids the first counts.
        """
        rest_ND, found = x_ND, []
        for book_KD in self.codebooks_LKD:
            codes_N = nearest(rest_ND, book_KD.double())
            found.append(codes_N)
            rest_ND = rest_ND - book_KD[codes_N]
        return torch.stack(found, dim=1)

    def decode(self, codes_NL: Tensor) -> Tensor:
        """Return the embeddings that codes stand for, ``[N, D]``: the sum of their centroids."""
        levels = zip(self.codebooks_LKD, codes_NL.T, strict=True)
        return torch.stack([book_KD[codes_N] for book_KD, codes_N in levels]).sum(dim=0)

    def save(self, path: Path) -> None:
        """Write the codebooks to a safetensors file, whole or not at all."""
        with replaced(path) as unfinished:
            save_file({NAME: self.codebooks_LKD.contiguous()}, unfinished)


def fit_codebooks(
    x_ND: Tensor, num_levels: int, num_codes: int, seed: int
) -> tuple[Codebooks, Tensor]:
    """Return codebooks for embeddings and the codes of each, int64 ``[N, L]``.

    On each level every code has the same number of items, but for 1, so that no level collapses to
    a few codes. Codes of items at the border of a full cluster are therefore not always the nearest
    ones. Raises :class:`ConfigError` for fewer items than codes.
    """
    if len(x_ND) < num_codes:
        raise ConfigError(
            f"there are {len(x_ND)} items for {num_codes} codes on each level; give more items or "
            "ask for fewer codes."
        )
    rest_ND, books, found = x_ND, [], []
    for level in range(num_levels):
        clusters = balanced_kmeans(rest_ND, num_codes, seed + level)
        books.append(clusters.centroids_KD)
        found.append(clusters.clusters_N)
        rest_ND = rest_ND - clusters.centroids_KD[clusters.clusters_N]
    return Codebooks(torch.stack(books)), torch.stack(found, dim=1)


def read_codebooks(path: Path) -> Codebooks:
    """Open the codebooks of a file; raise :class:`DataError` for a file that has none."""
    try:
        books_LKD = load_file(path)[NAME]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"{path} has no codebooks ({error}); give a folder that moeyard items wrote."
        ) from None
    if books_LKD.ndim != 3 or not books_LKD.isfinite().all():
        raise DataError(f"{path} has damaged codebooks; write it again with moeyard items.")
    return Codebooks(books_LKD)
