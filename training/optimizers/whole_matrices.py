"""Work on whole matrices that ranks hold in parts, or all hold: each has one rank that does it.

Ranks take turns: of N ranks, rank r works on the matrices r, r + N, r + 2N and so on. So no work is
done twice, and a rank has one whole matrix at a time. Next to it, gathering every matrix everywhere
would send N times as much and do all work on every rank.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...parallel.mesh import Mesh
from ...parallel.watch.pulse import pulse


class WholeMatrices:
    """The ranks that hold a run's dense parameters, whole or by rows."""

    def __init__(self, mesh: Mesh) -> None:
        self._group, self._rank, self._size = mesh.dp_group, mesh.dp_rank, mesh.dp_size

    def apply(
        self,
        function: Callable[[Tensor], Tensor],
        parts: Iterable[Tensor],
        parameters: Iterable[Tensor],
    ) -> Iterator[Tensor]:
        """Yield this rank's part of ``function`` of each whole matrix ``[rows, columns]``.

        ``parts`` are this rank's rows of the matrices, shared out like ``parameters``: all rows,
        or those of a sharded parameter. They are taken when needed. ``function`` keeps the shape.
        All ranks call it alike.
        """
        pairs = zip(parts, parameters, strict=True)
        while turn := list(islice(pairs, self._size)):
            mine: Tensor | None = None
            for owner, (part, parameter) in enumerate(turn):
                whole = self._collect(part, parameter, owner)
                if whole is not None:
                    mine = whole
            if mine is not None:  # not before, because others wait for the rows sent above
                mine = function(mine)
            for owner, (part, parameter) in enumerate(turn):
                result = mine if owner == self._rank else None
                yield self._spread(result, part, parameter, owner)

    @pulse.in_collective("the exchange of matrices to update")
    def _collect(self, part: Tensor, parameter: Tensor, owner: int) -> Tensor | None:
        """Return the whole matrix on the owner, None on other ranks."""
        is_owner = owner == self._rank
        if not isinstance(parameter, DTensor) or self._group is None:
            return part if is_owner else None
        padded = _padded(part, self._most_rows(parameter))
        found = [torch.empty_like(padded) for _ in range(self._size)] if is_owner else None
        dist.gather(padded, found, dst=owner, group=self._group)
        return None if found is None else torch.cat(found)[: parameter.shape[0]]

    @pulse.in_collective("the exchange of updated matrices")
    def _spread(self, whole: Tensor | None, part: Tensor, parameter: Tensor, owner: int) -> Tensor:
        """Return this rank's part of the owner's matrix."""
        if self._group is None:
            assert whole is not None, "one process owns all"
            return whole
        if not isinstance(parameter, DTensor):
            result = torch.empty_like(part) if whole is None else whole.contiguous()
            dist.broadcast(result, src=owner, group=self._group)
            return result
        rows = self._most_rows(parameter)
        sent = None
        if whole is not None:
            sent = list(_padded(whole, rows * self._size).split(rows))
        result = part.new_empty(rows, part.shape[1])
        dist.scatter(result, sent, src=owner, group=self._group)
        return result[: part.shape[0]]

    def _most_rows(self, parameter: Tensor) -> int:
        """Return how many rows the first rank has; the last ones may have fewer or none."""
        return -(-parameter.shape[0] // self._size)


def _padded(part: Tensor, rows: int) -> Tensor:
    """Return ``rows`` rows that begin with those of ``part``; zeros follow."""
    if part.shape[0] == rows:
        return part.contiguous()
    padded = part.new_zeros(rows, part.shape[1])
    padded[: part.shape[0]] = part
    return padded
