"""Windows of series, for training and for evaluations. C columns, N points, B windows, L points."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from ...errors import DataError
from .shuffled import ShuffledItems

Values = npt.NDArray[np.float32]
Observed = npt.NDArray[np.bool_]


class SeriesWindows(NamedTuple):
    """Some windows. Moved between devices as a whole."""

    values_BL: Tensor
    """fp32, standardised; 0 where a point was not observed."""
    observed_BL: Tensor
    """bool."""
    horizon: int
    """How many of the last points are to be forecast from the others; 0 in training."""


class Windows:
    """Windows of equal length that begin at places (column, point)."""

    def __init__(
        self, values_CN: Values, observed_CN: Observed, length: int, begins_CS: Observed
    ) -> None:
        """``length`` is L; ``begins_CS`` says where windows begin, S = N - L + 1."""
        self._values_CSL = sliding_window_view(values_CN, length, axis=1)
        self._observed_CSL = sliding_window_view(observed_CN, length, axis=1)
        self._columns_W, self._starts_W = (part.astype(np.int32) for part in begins_CS.nonzero())
        self.num_points = int(observed_CN.sum())
        """Observed points."""

    def __len__(self) -> int:
        return len(self._starts_W)

    def take(self, numbers: Sequence[int], horizon: int = 0) -> SeriesWindows:
        """Return windows by their number, in the order of columns and then of time."""
        chosen = np.array(numbers, dtype=np.int64)
        places = self._columns_W[chosen], self._starts_W[chosen]
        values_BL, observed_BL = self._values_CSL[places], self._observed_CSL[places]
        return SeriesWindows(torch.from_numpy(values_BL), torch.from_numpy(observed_BL), horizon)


class TrainingWindows(ShuffledItems):
    """All windows of the training part, of all columns, in a fresh random order each epoch.

    A window begins at an observed point and has another one.
    """

    def __init__(
        self, values_CN: Values, observed_CN: Observed, length: int, batch: int, seed: int
    ) -> None:
        """``length`` is L, ``batch`` the windows of a global batch."""
        counts_CS = _observed_in_windows(observed_CN, length)
        begins_CS = observed_CN[:, : counts_CS.shape[1]] & (counts_CS > 1)
        self._windows = windows = Windows(values_CN, observed_CN, length, begins_CS)
        if not len(windows):
            raise DataError(
                f"no window of train.sequence_length = {length} points has two observed ones; "
                "raise it, or lower data.max_gap."
            )
        super().__init__(len(windows), batch, seed)
        self.num_points = windows.num_points
        """Observed points."""
        self.identity = _hash(values_CN, observed_CN)

    def rows(self, numbers: Sequence[int]) -> SeriesWindows:
        """Return windows by their number, in the order of columns and then of time."""
        return self._windows.take(numbers)


class HeldOutWindows(Windows):
    """All forecasts of the held-out part: ``horizon`` points of it behind ``context`` points.

    Both have an observed point. A context may reach back into the lines before the part.
    """

    def __init__(
        self, values_CN: Values, observed_CN: Observed, context: int, horizon: int
    ) -> None:
        """The arrays begin ``context`` points before the part."""
        starts = values_CN.shape[1] - context - horizon + 1
        seen_CS = _observed_in_windows(observed_CN, context)[:, :starts] > 0
        wanted_CS = _observed_in_windows(observed_CN[:, context:], horizon) > 0
        super().__init__(values_CN, observed_CN, context + horizon, seen_CS & wanted_CS)
        if not len(self):
            raise DataError(
                f"no held-out window has observed points among both data.context = {context} and "
                f"data.horizon = {horizon}; lower data.max_gap, or raise them."
            )
        self._horizon = horizon
        self.identity = _hash(values_CN, observed_CN, np.array([context, horizon]))

    def rows(self, numbers: Sequence[int]) -> SeriesWindows:
        """Return windows by their number."""
        return self.take(numbers, self._horizon)


def _observed_in_windows(observed_CN: Observed, length: int) -> npt.NDArray[np.int64]:
    """Return how many points were observed in each window, ``[C, N - L + 1]``."""
    ends_CN = np.cumsum(np.pad(observed_CN, ((0, 0), (1, 0))), axis=1)
    return ends_CN[:, length:] - ends_CN[:, :-length]


def _hash(*arrays: npt.NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
