"""N:M sparsity: of each M consecutive inputs of a weight's row, the N largest stay (Zhou et al.
2021, arXiv 2102.04010).

Q outputs and P inputs of a matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class NOfM(NamedTuple):
    """How many weights of each group of consecutive inputs stay."""

    n: int
    m: int

    def __str__(self) -> str:
        """Return it as papers write it."""
        return f"{self.n}:{self.m}"


def keep_mask(weight: Tensor, pattern: NOfM) -> Tensor:
    """Return which weights stay, bool like ``weight`` ``[..., Q, P]``: N of each M along P.

    Those with the largest magnitude; of equal ones the first. M must divide P.
    """
    size_MG = weight.abs().reshape(-1, pattern.m).T.contiguous()
    wins_MG = torch.zeros_like(size_MG, dtype=torch.uint8)
    for second in range(1, pattern.m):
        for first in range(second):
            first_wins_G = size_MG[first] >= size_MG[second]
            wins_MG[first] += first_wins_G
            wins_MG[second] += ~first_wins_G
    return (wins_MG >= pattern.m - pattern.n).T.reshape(weight.shape)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a weight with zeros, never -0, where the mask is False."""
    return torch.where(mask, weight, 0)
