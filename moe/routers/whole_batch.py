"""Losses of sums over the global batch that are not linear, such as a coefficient of variation.

Ranks exchange only integers without gradient (:class:`Routing.extra_counts`). Sums of real numbers
go along in fixed point: then the result does not depend on the order of ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SCALE = 2.0**40
"""Steps of 1e-12; sums may be as large as 8 million, tokens of a step."""


def to_fixed_point(sums: Tensor) -> Tensor:
    """Return int64 for ``Routing.extra_counts``; not for values beyond 8 million."""
    return (sums.detach().double() * SCALE).round().long()


def from_fixed_point(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the summed values."""
    return (counts.double() / SCALE).to(dtype)


def share_of(
    loss: Callable[[Tensor], Tensor], here: Tensor, whole: Tensor, part: Tensor | float
) -> Tensor:
    """Return this rank's share of ``loss(whole)``, in value and in gradient.

    ``here`` are this rank's sums, with gradient, and ``whole`` those of the global batch, without.
    ``part`` is this rank's part of the batch; the parts of all ranks add up to 1. The loss around
    ``whole`` is linear in ``here``, so the gradients of the shares add up to the loss's own.
    """
    with torch.enable_grad():
        point = whole.detach().clone().requires_grad_()
        value = loss(point)
        (slope,) = torch.autograd.grad(value, point)
    rest = value.detach() - (slope * whole).sum()
    return (slope * here).sum() + part * rest
