"""A mixture of Student's t and a normal distribution for each point: density and samples.

Moirai (Woo et al. 2024) forecasts mixtures. Student's t takes series with outliers, and the normal
one those without. Its log-normal and negative binomial parts are left out: they are for values that
are never negative, which scaled values are.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_PARAMETERS = 6
"""Numbers from which the distribution of a point is made."""
LEAST_FREEDOM = 2.0
"""More degrees of freedom than this, so that the variance is finite."""
LEAST_SCALE = 1e-3
"""Scales are larger, so that a point that is known exactly has no infinite density."""
NUM_UNIFORMS = 3
"""Uniform numbers that a sample of a point takes."""


class Mixture(NamedTuple):
    """The distributions of some points, each tensor ``[...]``."""

    log_share_t: Tensor
    """Logarithm of the share of Student's t."""
    log_share_normal: Tensor
    freedom: Tensor
    """Degrees of freedom of Student's t."""
    loc_t: Tensor
    scale_t: Tensor
    loc_normal: Tensor
    scale_normal: Tensor

    def log_density(self, x: Tensor) -> Tensor:
        """Return the logarithm of the density at ``x [...]``, in nats."""
        log_t = self.log_share_t + _log_student(self.freedom, (x - self.loc_t) / self.scale_t)
        z = (x - self.loc_normal) / self.scale_normal
        log_normal = self.log_share_normal - 0.5 * (z.square() + math.log(2 * math.pi))
        return torch.logaddexp(log_t - self.scale_t.log(), log_normal - self.scale_normal.log())

    def samples(self, uniforms: Tensor) -> Tensor:
        """Return samples made from numbers between 0 and 1, ``[3, ...]``, which may broadcast.

        The first number chooses the part. The other two make a sample of it, by the polar method
        for Student's t (Bailey 1994), which for a normal distribution is that of Box and Muller.
        """
        choice, radius, angle = uniforms
        direction = torch.cos(2 * math.pi * angle)
        log_radius = radius.log()
        spread_t = (self.freedom * torch.expm1(-2 * log_radius / self.freedom)).sqrt()
        spread_normal = (-2 * log_radius).sqrt()
        return torch.where(
            choice.log() < self.log_share_t,
            self.loc_t + self.scale_t * spread_t * direction,
            self.loc_normal + self.scale_normal * spread_normal * direction,
        )


def mixture_of(raw: Tensor) -> Mixture:
    """Return the distributions that a head's ``[..., 6]`` numbers mean, at least in fp32."""
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    share, freedom, loc_t, scale_t, loc_normal, scale_normal = wide.unbind(dim=-1)
    return Mixture(
        log_share_t=F.logsigmoid(share),
        log_share_normal=F.logsigmoid(-share),
        freedom=LEAST_FREEDOM + F.softplus(freedom),
        loc_t=loc_t,
        scale_t=LEAST_SCALE + F.softplus(scale_t),
        loc_normal=loc_normal,
        scale_normal=LEAST_SCALE + F.softplus(scale_normal),
    )


def _log_student(freedom: Tensor, z: Tensor) -> Tensor:
    """Return the logarithm of the density of Student's t at ``z``."""
    half = freedom / 2
    constant = torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * (freedom * math.pi).log()
    return constant - (half + 0.5) * torch.log1p(z.square() / freedom)
