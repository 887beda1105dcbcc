"""The token ids of a cache's positions, for routers that read the id before a row."""

import torch
from torch import Tensor


class KeptIds:
    """Ids by position. All, and not the last alone: after a failed step, caches go back."""

    def __init__(self, device: torch.device) -> None:
        self._ids_S = torch.empty(0, dtype=torch.int64, device=device)

    def keep(self, start: int, ids_L: Tensor) -> None:
        """Store the ids of the positions from ``start`` on; those before it must be here."""
        end = start + len(ids_L)
        if len(self._ids_S) < end:
            before_S = self._ids_S[:start]
            self._ids_S = before_S.new_empty(max(64, end, 2 * len(self._ids_S)))
            self._ids_S[: len(before_S)] = before_S
        self._ids_S[start:end] = ids_L

    def at(self, position: int) -> Tensor:
        """Return the id of a position, int64 scalar; only if it was kept."""
        return self._ids_S[position]
