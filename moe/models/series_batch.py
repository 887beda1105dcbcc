"""Points of series as the rows of a batch. B series, L points of each, T rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, batch_of
from ..kv_cache import KVCache
from .documents import pack


@dataclass(frozen=True, slots=True)
class SeriesBatch(Batch):
    """Rows that are points of series.

    The bits of a point in fp32 take the place of a token id, so that route files and the draws of
    routers tell rows apart.
    """

    values_T: Tensor | None = None
    """The value of each point; never None."""


def has_row(observed_BL: Tensor) -> Tensor:
    """Return which points have a row, bool ``[B, L]``: all from the first observed one on."""
    return observed_BL.cumsum(dim=1) > 0


def carried_forward(values_BL: Tensor, observed_BL: Tensor) -> Tensor:
    """Return the values, where points that were not observed have the last observed value.

    Points before the first observed one have any value.
    """
    places_L = torch.arange(values_BL.shape[1], device=values_BL.device)
    places_BL = torch.where(observed_BL, places_L, torch.zeros_like(places_L))
    if values_BL.numel():
        places_BL = places_BL.cummax(dim=1).values
    return values_BL.gather(1, places_BL)


def batch_of_series(
    values_BL: Tensor, observed_BL: Tensor, caches: Sequence[KVCache] | None = None
) -> SeriesBatch:
    """Return the points that have a row (:func:`has_row`), each series from position 0.

    A point that was not observed is read as the last one that was. A series without any observed
    point is not in the batch. Empty ``caches`` keep the rows.
    """
    is_row_BL = has_row(observed_BL)
    values_T = carried_forward(values_BL, observed_BL)[is_row_BL]
    counts_B = is_row_BL.sum(dim=1).cpu().numpy()
    counts_B = counts_B[counts_B > 0]
    starts_B = np.cumsum(counts_B) - counts_B
    positions_T = torch.from_numpy(np.arange(len(values_T)) - np.repeat(starts_B, counts_B))
    is_ragged = caches is None and len(set(counts_B.tolist())) > 1
    return SeriesBatch(
        ids_T=_bits(values_T),
        positions_T=positions_T.to(values_T.device),
        lengths=tuple(counts_B.tolist()),
        caches=None if caches is None else tuple(caches),
        packing=pack(starts_B, counts_B, values_T.device) if is_ragged else None,
        values_T=values_T,
    )


def next_points(values_BH: Tensor, caches: Sequence[KVCache]) -> SeriesBatch:
    """Return the next points of series whose earlier ones are in ``caches``; both may be empty."""
    if not caches:
        return batch_of_series(values_BH, torch.ones_like(values_BH, dtype=torch.bool))
    rows = batch_of(list(_bits(values_BH)), caches)
    return SeriesBatch(
        ids_T=rows.ids_T,
        positions_T=rows.positions_T,
        lengths=rows.lengths,
        caches=rows.caches,
        values_T=values_BH.reshape(-1),
    )


def _bits(values: Tensor) -> Tensor:
    """Return the bits of values in fp32 as int64."""
    return values.detach().float().view(torch.int32).long()
