"""SparseAllGather and SparseReduceScatter: only some experts travel, to only some ranks (Hecate).

A message carries all experts that have the same owner and the same holders. If these are all ranks
it is a broadcast, and a reduction on the way back; else the owner and the holders send it to each
other. All ranks of the group call both with the same placement.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..planning.placement import Placement
from ..watch.pulse import pulse

PartsOf = Callable[[int], Sequence[Tensor]]
"""From an expert to its contiguous tensors on this rank."""


class SparseCollectives:
    """Both collectives over one process group; ``rank`` is this process's in the group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)

    @pulse.in_collective("the copying of experts")
    def gather(self, placement: Placement, owned: PartsOf, copied: PartsOf) -> None:
        """Copy experts from their owners to the other holders: ``owned`` are read there, and
        ``copied`` written here."""
        for (owner, holders), experts in messages(placement).items():
            if self.rank not in holders:
                continue
            mine = owned if self.rank == owner else copied
            parts = [part for expert in experts for part in mine(expert)]
            message = _packed(parts) if self.rank == owner else _like(parts)
            if len(holders) == self._size:
                dist.broadcast(message, self._global(owner), group=self._group)
            elif self.rank == owner:
                self._send(message, [rank for rank in holders if rank != owner])
            else:
                dist.recv(message, self._global(owner), group=self._group)
            if self.rank != owner:
                for part, values in zip(parts, _split(message, parts), strict=True):
                    part.copy_(values)

    @pulse.in_collective("the sum of gradients of copied experts")
    def reduce(
        self, placement: Placement, copied: PartsOf, like: PartsOf
    ) -> dict[int, list[Tensor]]:
        """Return, for this owner's experts, the sums of the other holders' ``copied`` values.

        They are added in a fixed order. ``like`` has the shapes of an owner's expert.
        """
        found: dict[int, list[Tensor]] = {}
        for (owner, holders), experts in messages(placement).items():
            if self.rank not in holders:
                continue
            is_owner = self.rank == owner
            parts = [part for e in experts for part in (like(e) if is_owner else copied(e))]
            message = _like(parts).zero_() if is_owner else _packed(parts)
            if len(holders) == self._size:
                dist.reduce(message, self._global(owner), group=self._group)
            elif is_owner:
                for rank in holders:
                    if rank != owner:
                        other = torch.empty_like(message)
                        dist.recv(other, self._global(rank), group=self._group)
                        message += other
            else:
                dist.send(message, self._global(owner), group=self._group)
            if is_owner:
                sums = iter(_split(message, parts))
                found |= {expert: [next(sums) for _ in like(expert)] for expert in experts}
        return found

    def _send(self, message: Tensor, ranks: list[int]) -> None:
        work = [dist.isend(message, self._global(rank), group=self._group) for rank in ranks]
        for sent in work:
            assert sent is not None, "this rank is in the group"
            sent.wait()

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)


def messages(placement: Placement) -> dict[tuple[int, tuple[int, ...]], list[int]]:
    """Return, by owner and holders, the experts that travel; the same order on all ranks."""
    found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for expert, (owner, holders) in enumerate(
        zip(placement.owner_E, placement.holders_E, strict=True)
    ):
        if len(holders) > 1:
            found.setdefault((owner, holders), []).append(expert)
    return found


def _packed(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _like(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty(sum(part.numel() for part in parts))


def _split(message: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a message with the shapes of ``parts``."""
    pieces = message.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
