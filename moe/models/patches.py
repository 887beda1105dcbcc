"""Series in patches: how they are cut, scaled and laid out as rows.

B series, L points, N patches of a series, P points of a patch, T rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch, batch_of
from ..kv_cache import KVCache
from ..routers.draws import MIX
from .documents import batch_of_lengths

LEAST_VARIANCE = 1e-10
"""Times the mean square of a series, added to its variance, which is 0 for a constant series. The
published code adds 1e-5 whatever the units are."""


@dataclass(frozen=True, slots=True)
class Patches:
    """Series whose last points are the ends of their last patches.

    Patches before a series' first observed point do not count as the series'.
    """

    values_BNP: Tensor
    """fp64; 0 where nothing was observed."""
    observed_BNP: Tensor
    first_B: Tensor
    """int64: the first patch of each series; N for a series without any observed point."""

    @property
    def is_of_series_BN(self) -> Tensor:
        """True for the patches of a series."""
        return self._places_N >= self.first_B.unsqueeze(1)

    @property
    def positions_BN(self) -> Tensor:
        """The number of each patch in its series."""
        return self._places_N - self.first_B.unsqueeze(1)

    @property
    def _places_N(self) -> Tensor:
        return torch.arange(self.values_BNP.shape[1], device=self.first_B.device)

    def scaled(self, loc_B: Tensor, scale_B: Tensor) -> Tensor:
        """Return ``(value - loc) / scale``, ``[B, N, P]``; 0 where nothing was observed."""
        scaled_BNP = (self.values_BNP - loc_B[:, None, None]) / scale_B[:, None, None]
        return torch.where(self.observed_BNP, scaled_BNP, 0)


def cut(values_BL: Tensor, observed_BL: Tensor, patch: int) -> Patches:
    """Cut series into patches; the first one is filled up with points that were not observed.

    Values where nothing was observed may be anything, NaN included.
    """
    observed_BL = observed_BL.bool()
    values_BL = torch.where(observed_BL, values_BL.double(), 0)
    missing = -values_BL.shape[1] % patch
    values_BNP, observed_BNP = (
        F.pad(t, (missing, 0)).unflatten(1, (-1, patch)) for t in (values_BL, observed_BL)
    )
    any_BN = observed_BNP.any(dim=2)
    first_B = torch.where(any_BN.any(dim=1), any_BN.int().argmax(dim=1), any_BN.shape[1])
    return Patches(values_BNP, observed_BNP, first_B)


def scale_of(values_BNP: Tensor, observed_BNP: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the observed points of each series, fp64 ``[B]``.

    The variance is divided by the number of points less one. Where the deviation would be 0, as for
    a series of zeros, it is 1.
    """
    values_BNP = torch.where(observed_BNP, values_BNP, 0)
    count_B = observed_BNP.sum(dim=(1, 2))
    loc_B = values_BNP.sum(dim=(1, 2)) / count_B.clamp(min=1)
    centred_BNP = torch.where(observed_BNP, values_BNP - loc_B[:, None, None], 0)
    variance_B = centred_BNP.square().sum(dim=(1, 2)) / (count_B - 1).clamp(min=1)
    square_B = values_BNP.square().sum(dim=(1, 2)) / count_B.clamp(min=1)
    scale_B = (variance_B + LEAST_VARIANCE * square_B).sqrt()
    return loc_B, torch.where(scale_B > 0, scale_B, 1)


def varies(values_BNP: Tensor, observed_BNP: Tensor) -> Tensor:
    """Return bool ``[B]``: whether the observed points of each series have two values or more."""
    low_B = torch.where(observed_BNP, values_BNP, torch.inf).amin(dim=(1, 2))
    return low_B < torch.where(observed_BNP, values_BNP, -torch.inf).amax(dim=(1, 2))


@dataclass(frozen=True, slots=True)
class PatchBatch(Batch):
    """Rows that are patches of series. Numbers of patches are in the place of token ids."""

    scaled_TP: Tensor | None = None
    """The patches; never None."""


def batch_of_patches(scaled_TP: Tensor, ids_T: Tensor, lengths_B: Tensor) -> PatchBatch:
    """Return the rows of series as sequences, each from position 0; there may be none."""
    lengths = lengths_B[lengths_B > 0].cpu().numpy()
    if not len(lengths):
        return PatchBatch(ids_T, ids_T, (), scaled_TP=scaled_TP)
    rows = batch_of_lengths(ids_T, lengths)
    return PatchBatch(
        ids_T, rows.positions_T, rows.lengths, packing=rows.packing, scaled_TP=scaled_TP
    )


def batch_after(
    caches: Sequence[KVCache], scaled_TP: Tensor, ids_T: Tensor, lengths: Sequence[int]
) -> PatchBatch:
    """Return the next rows of series whose earlier ones are in ``caches``; there may be none."""
    if not caches:
        return PatchBatch(ids_T, ids_T, (), scaled_TP=scaled_TP)
    rows = batch_of(ids_T.split(list(lengths)), caches)
    return PatchBatch(
        ids_T, rows.positions_T, rows.lengths, caches=rows.caches, scaled_TP=scaled_TP
    )


def patch_ids(values_TP: Tensor) -> Tensor:
    """Return a number below 2^31 for each patch, which stands for its values.

    In route files and in the draws of routers it tells rows apart, as a token's id does. Integers
    are summed, so that it does not depend on the other rows.
    """
    places_P = torch.arange(values_TP.shape[1], device=values_TP.device)
    bits_TP = values_TP.double().contiguous().view(torch.int64)
    mixed_T = (bits_TP * ((2 * places_P + 1) * MIX)).sum(dim=1)
    return (mixed_T >> 33).bitwise_and((1 << 31) - 1)
