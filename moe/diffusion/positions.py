"""Sines and cosines of positions and timesteps (Vaswani et al. 2017).

D model width, B images, L tokens of an image.
"""

import torch
from torch import Tensor

LONGEST = 10_000.0
"""The longest wavelength is this many times that of the fastest wave."""


def waves(values_N: Tensor, width: int) -> Tensor:
    """Return sines and cosines of numbers, fp64 ``[N, width]``; ``width`` is even."""
    places = torch.arange(width // 2, dtype=torch.float64, device=values_N.device)
    angles = values_N.double().unsqueeze(1) * LONGEST ** (-places / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def time_features(times_B: Tensor, width: int) -> Tensor:
    """Return what a model reads of timesteps, fp64 ``[B, D]``; D is even."""
    return waves(times_B, width)


def grid_positions(height: int, width: int, d_model: int) -> Tensor:
    """Return the positions of the tokens of a grid, row by row, fp64 ``[L, D]``.

    One half of D is for the row, the other for the column; D is a multiple of 4.
    """
    of_rows = waves(torch.arange(height), d_model // 2).repeat_interleave(width, dim=0)
    of_columns = waves(torch.arange(width), d_model // 2).repeat(height, 1)
    return torch.cat([of_rows, of_columns], dim=1)
