"""Futures of series that are drawn at random: the numbers they are drawn from, and what they say.

B series, N patches of one, S futures, H points of a forecast, Q quantiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ..routers.draws import MIX, sequence_keys

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


def uniforms_of(seed: int, ids: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return fp64 numbers between 0 and 1, ``[B, *shape]``, on the host, where all devices draw.

    Those of a series follow from the seed and ``ids_N``, the numbers of its patches. A smaller
    first dimension of the shape has the first ones of a larger one.
    """
    drawn = [torch.empty(0, *shape, dtype=torch.float64)]
    for ids_N in ids:
        (key,) = sequence_keys(ids_N, (len(ids_N),))
        generator = torch.Generator().manual_seed((key * MIX + seed) % (1 << 63))
        points = torch.rand(shape, generator=generator, dtype=torch.float64)
        drawn.append(points.clamp(min=SMALLEST).unsqueeze(0))
    return torch.cat(drawn)


def mean_and_quantiles(futures_BSH: Tensor, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the mean of futures, ``[B, H]``, and their quantiles, ``[B, H, Q]``, both fp32."""
    num_series, _, horizon = futures_BSH.shape
    levels_Q = torch.tensor(list(quantiles), dtype=futures_BSH.dtype, device=futures_BSH.device)
    found_BHQ = futures_BSH.new_empty(num_series, horizon, len(levels_Q))
    if found_BHQ.numel():
        found_BHQ = torch.quantile(futures_BSH, levels_Q, dim=1).permute(1, 2, 0)
    return futures_BSH.mean(dim=1).float(), found_BHQ.float()
