"""Other owners for experts whose load has changed, while requests run.

L MoE layers, E experts, N rows, K choices, P owners.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ...parallel.planning.materialize import CopyBudget
from ...parallel.planning.placement import Placement, Topology
from ...parallel.planning.reshard import moves, reshard
from .ownership import Ownership

if TYPE_CHECKING:
    from collections.abc import Mapping

EVERY = 500
"""Forwards between two looks at the load."""
WORTHWHILE = 1.1
"""Owners change if the fullest one then has so many times fewer rows: each expert that moves is
read from disk once."""


class Rebalancer:
    """Counts rows, and now and then finds better owners. It needs no pause: see ownership.py."""

    def __init__(self, moe_layers: list[int], num_experts: int, every: int = EVERY) -> None:
        self._every = every
        self._layers = moe_layers
        self._counts = {layer: np.zeros(num_experts + 1, np.int64) for layer in moe_layers}
        """The first element is for choice -1."""
        self._forwards = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rebalance")
        self._plan: Future[Mapping[int, Placement] | None] | None = None
        self.num_moved = 0
        """Experts that have changed their owner so far."""

    def count(self, layer: int, experts_NK: npt.NDArray[np.int32]) -> None:
        """Count a forward's rows."""
        counts = self._counts[layer]
        counts += np.bincount(experts_NK.reshape(-1) + 1, minlength=len(counts))

    def step(self, ownership: Ownership) -> bool:
        """Between two forwards: take a finished plan, or begin one; say whether owners changed."""
        self._forwards += 1
        if self._plan is not None and self._plan.done():
            found, self._plan = self._plan.result(), None
            if found is None:
                return False
            before = [ownership.placements[layer] for layer in self._layers]
            self.num_moved += len(moves(before, [found[layer] for layer in self._layers]))
            ownership.replace(found)
            return True
        if self._plan is None and self._forwards % self._every == 0:
            load_LE = torch.from_numpy(np.stack([self._counts[i][1:] for i in self._layers]))
            for counts_E in self._counts.values():
                counts_E //= 2  # older rows count less
            current, num_owners = dict(ownership.placements), ownership.num_owners
            self._plan = self._thread.submit(better_owners, current, load_LE, num_owners)
        return False

    def close(self) -> None:
        """Stop planning."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def better_owners(
    current: "Mapping[int, Placement]", load_LE: torch.Tensor, num_owners: int
) -> "Mapping[int, Placement] | None":
    """Return owners whose loads are more even, or None if they are not worth the moves.

    ``load_LE`` has a row for each of the layers of ``current``.
    """
    placements = list(current.values())
    budget = CopyBudget(experts=load_LE.shape[1], per_rank=0)
    found = reshard(placements, load_LE, Topology.one_node(num_owners), budget)
    if fullest_rows(placements, load_LE) < WORTHWHILE * fullest_rows(found, load_LE):
        return None
    return dict(zip(current, found, strict=True))


def fullest_rows(placements: list[Placement], load_LE: torch.Tensor) -> float:
    """Return the rows of the fullest owner, summed over layers."""
    total = 0.0
    for placement, load_E in zip(placements, load_LE, strict=True):
        load_P = torch.zeros(placement.num_ranks, dtype=torch.float64)
        load_P.index_add_(0, torch.tensor(placement.owner_E), load_E.double())
        total += float(load_P.max())
    return total
