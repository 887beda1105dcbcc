"""Matrices made orthogonal by Newton-Schulz steps, as Muon does (Jordan et al. 2024)."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic step of github.com/KellerJordan/Muon. They are chosen for speed near 0, not for
accuracy: singular values end in about [0.68, 1.20]."""
LEAST_NORM = 1e-7
"""Matrices of a smaller norm are not scaled up to 1."""


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Return ``[..., rows, columns]`` with the singular vectors of ``x`` and values close to 1.

    Each matrix of the batch by itself, so experts do not mix. Singular values below 0.0025 of the
    matrix's norm end below 0.68, and those that are 0 stay 0. Matrix products are in fp64 for
    fp64, in bf16 on a GPU, where they are fastest, and else in fp32. The result has the type of
    ``x``.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    a, b, c = COEFFICIENTS
    y = x.mT if is_tall else x
    y = (y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=LEAST_NORM)).to(_type_for(x))
    for _ in range(steps):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return (y.mT if is_tall else y).to(x.dtype)


def _type_for(x: Tensor) -> torch.dtype:
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda else torch.float32
