"""A batch on several ranks, without processes: the reduction adds up what the ranks count."""

from collections.abc import Sequence

import torch

import moeyard
from moeyard.moe.routers.losses import AuxiliaryLosses, auxiliary_losses
from moeyard.moe.routers.routing import RouterInput


def losses_of_ranks(
    gate: moeyard.Router, parts: Sequence[RouterInput]
) -> tuple[torch.Tensor, list[AuxiliaryLosses]]:
    """Return the sum of all ranks' losses, and each rank's."""
    routings = [gate.route(part) for part in parts]
    packed: list[torch.Tensor] = []
    for routing in routings:
        auxiliary_losses([routing], [gate], lambda counts: packed.append(counts) or counts)
    total = torch.stack(packed).sum(0)
    shares = [auxiliary_losses([routing], [gate], lambda _: total) for routing in routings]
    return torch.stack([share.total for share in shares]).sum(), shares
