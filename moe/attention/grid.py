"""Ragged rows as a rectangle, for attention that needs a mask.

T rows, B sequences of padded length L, S keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.values.memory import to_device


class Grid(NamedTuple):
    """Where the rows of a batch are in a rectangle of ``[B, L]``, made once for all layers."""

    num_sequences: int
    length: int
    """L, the length of the longest sequence."""
    rows_P: Tensor | None
    """int64: the batch's row at each of the B*L places. Padding repeats a sequence's last
    row. None = all lengths are equal, and rows stay where they are."""
    places_T: Tensor | None
    """int64: the place of each row."""
    is_real_BL: Tensor | None
    """bool: True for rows that are there; None = all are."""

    def spread(self, x: Tensor) -> Tensor:
        """Return rows ``[T, ...]`` as ``[B, L, ...]``."""
        if self.rows_P is not None:
            x = x.index_select(0, self.rows_P)
        return x.unflatten(0, (self.num_sequences, self.length))

    def collect(self, x: Tensor) -> Tensor:
        """Return a rectangle ``[B, L, ...]`` as rows ``[T, ...]``."""
        x = x.flatten(0, 1)
        return x if self.places_T is None else x.index_select(0, self.places_T)


def grid_of(lengths: tuple[int, ...], device: torch.device) -> Grid:
    """Return the rectangle of sequences of ``lengths``, each with one row or more."""
    count, longest = len(lengths), max(lengths, default=1)
    if len(set(lengths)) <= 1:
        return Grid(count, longest, None, None, None)
    lengths_B = torch.tensor(lengths, device="cpu")
    starts_B = lengths_B.cumsum(0) - lengths_B
    columns_1L = torch.arange(longest, device="cpu")[None]
    rows_BL = starts_B[:, None] + torch.minimum(columns_1L, lengths_B[:, None] - 1)
    is_real_BL = columns_1L < lengths_B[:, None]
    places_T = is_real_BL.flatten().nonzero().squeeze(1)
    rows_P, places_T, is_real_BL = (
        to_device(t, device) for t in (rows_BL.flatten(), places_T, is_real_BL)
    )
    return Grid(count, longest, rows_P, places_T, is_real_BL)
