"""Which owner computes an expert. L MoE layers, E experts, N rows, K choices."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError
from ...parallel.planning.placement import Placement

Owners = npt.NDArray[np.int16]
NO_OWNER = -1
"""The owner of a choice that is no expert."""


class Ownership:
    """The owner of every expert. Owner 0 is the leader itself.

    It may change between forwards: every owner can read every expert, so what it owns decides only
    what it is asked for.
    """

    def __init__(self, placements: Mapping[int, Placement], num_owners: int) -> None:
        """``placements`` are those of the MoE layers, by their index in the decoder."""
        self.num_owners = num_owners
        self.replace(placements)

    def replace(self, placements: Mapping[int, Placement]) -> None:
        """Take other owners from the next forward on."""
        # The last element answers for choice -1.
        self._owners = {
            layer: np.array([*placement.owner_E, NO_OWNER], dtype=np.int16)
            for layer, placement in placements.items()
        }
        self.placements = dict(placements)

    def owner_NK(self, layer: int, experts_NK: npt.NDArray[np.int32]) -> Owners:
        """Return the owner of each choice."""
        found: Owners = self._owners[layer][experts_NK]
        return found

    def owned_by(self, owner: int) -> dict[int, list[int]]:
        """Return the experts of an owner by layer."""
        return {layer: found.owned_by(owner) for layer, found in self.placements.items()}

    def count(self, owner: int) -> int:
        """Return how many experts an owner has, over all layers."""
        return sum(map(len, self.owned_by(owner).values()))


def contiguous(moe_layers: Sequence[int], num_experts: int, num_owners: int) -> Ownership:
    """Return neighbouring experts with one owner; :class:`ConfigError` for too many owners."""
    check_owners(num_owners, num_experts)
    placement = Placement.contiguous(num_experts, num_owners)
    return Ownership(dict.fromkeys(moe_layers, placement), num_owners)


def check_owners(num_owners: int, num_experts: int) -> None:
    """Raise :class:`ConfigError` unless each owner can have an expert of every layer."""
    if num_experts == 0:
        raise ConfigError(
            f"expert-parallel is {num_owners}, but the model has no experts; leave it out."
        )
    if not 1 <= num_owners <= num_experts:
        raise ConfigError(
            f"expert-parallel is {num_owners}, but a layer has {num_experts} experts; use 1 to "
            f"{num_experts}."
        )
