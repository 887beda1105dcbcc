"""Futures of series that are drawn at random: the numbers they are drawn from, and what they say.

S futures, P points of a patch, H points of a forecast, Q quantiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ..routers.draws import MIX

SMALLEST = 2.0**-53
"""The smallest number drawn, because 0 has no logarithm."""


def check_request(
    horizon: int, quantiles: Sequence[float], observed_BL: Tensor, longest: int
) -> None:
    """Raise :class:`ConfigError` for a forecast that cannot be made."""
    if not 1 <= horizon <= longest:
        raise ConfigError(f"horizon is {horizon}; use a number from 1 to {longest}.")
    for quantile in quantiles:
        if not 0 < quantile < 1:
            raise ConfigError(f"a quantile is {quantile}; use numbers between 0 and 1.")
    empty = (~observed_BL.bool().any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(
            f"series {empty[0]} has no observed point to go on from; leave it out, or give a part "
            "with values."
        )


def generator_for(seed: int, key: int) -> torch.Generator:
    """Return the generator of a series' futures; ``key`` depends on its values."""
    return torch.Generator().manual_seed((key * MIX + seed) % (1 << 63))


def uniforms(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Return fp64 numbers between 0 and 1, drawn on the host, so that devices draw alike."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    return drawn.clamp(min=SMALLEST).to(device)


def mean_and_quantiles(futures_SH: Tensor, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the mean of futures, ``[H]``, and their quantiles, ``[H, Q]``, both fp32."""
    levels_Q = torch.tensor(list(quantiles), dtype=futures_SH.dtype, device=futures_SH.device)
    quantiles_HQ = futures_SH.new_empty(futures_SH.shape[1], len(levels_Q))
    if len(levels_Q):
        quantiles_HQ = torch.quantile(futures_SH, levels_Q, dim=0).T
    return futures_SH.mean(dim=0).float(), quantiles_HQ.float()
