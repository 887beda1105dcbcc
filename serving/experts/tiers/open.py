"""The tiers of a store: the disk, and host memory in front of it if there is any."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....moe.folders.folder import ModelFolder
from ..budget import host_bytes
from ..pools import Pools
from .host import HostTier
from .measured import MeasuredTier
from .rates import Rates
from .stored_form import name_of_bytes
from .tier import Tier


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where a store's slots are filled from."""

    first: Tier
    """The one that is asked; it asks the others."""
    rates: Rates
    close: Callable[[], None]


def open_tiers(
    disk: Tier, folder: ModelFolder, dtype: torch.dtype, pools: Pools, host_memory: str | None
) -> Tiers:
    """Return the tiers of ``folder``; raises :class:`ConfigError` where Ray cannot hold copies."""
    rates = Rates()
    num_bytes = host_bytes(folder, dtype, host_memory)
    if num_bytes == 0:
        return Tiers(MeasuredTier(disk, rates, pools), rates, _nothing)
    from .node_link import NodeLink  # needs Ray

    copies = NodeLink(name_of_bytes(folder, dtype), num_bytes)
    tier = HostTier(disk, copies, rates, pools)
    return Tiers(tier, rates, tier.close)


def _nothing() -> None:
    """A disk alone needs no farewell."""
