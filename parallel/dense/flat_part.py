"""A range of a parameter's numbers, which one rank updates: how DeepSpeed splits parameters.

Numbers are in the order of the parameter's memory, so a range may begin and end inside a row. The
checkpoint has the whole tensor, of which torch.distributed.checkpoint writes and reads boxes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..experts.sliced_tensor import SlicedTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part of a tensor begins, and its shape."""


@dataclass(frozen=True, slots=True)
class FlatPart:
    """The numbers of one parameter from ``start`` on that this rank holds, perhaps none."""

    shape: tuple[int, ...]
    """Of the whole parameter, which may be empty while no one needs it."""
    start: int
    local: Tensor
    """The master weights, ``[numbers]``."""
    group: dist.ProcessGroup
    """The ranks that together have the whole parameter."""
    put: Callable[[Tensor], None]
    """Gives the parameter these values on all ranks, which all have them."""

    def stored(self, values: Tensor) -> SlicedTensor | None:
        """Return ``values`` of this range for a checkpoint, sharing memory; None if it is empty."""
        found = boxes(self.shape, self.start, self.start + len(values))
        parts = values.split([math.prod(sizes) for _, sizes in found])
        pieces = [
            (offset, part.view(sizes)) for (offset, sizes), part in zip(found, parts, strict=True)
        ]
        return SlicedTensor(self.shape, pieces) if pieces else None

    def whole(self, values: Tensor) -> Tensor:
        """Return the whole tensor of which each rank has ``values``; all ranks call this."""
        whole = torch.zeros(math.prod(self.shape), dtype=values.dtype, device=values.device)
        whole[self.start : self.start + len(values)] = values
        dist.all_reduce(whole, group=self.group)
        return whole.view(self.shape)

    def refresh(self) -> None:
        """Give the parameter the master weights of all ranks; all of them call this."""
        self.put(self.whole(self.local))


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut a range of a tensor's numbers into boxes, in order: parts of rows and whole rows."""
    if start >= stop:
        return []
    if len(shape) < 2:
        return [((start,), (stop - start,))] if shape else [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    found = []
    if start < first * row:
        found += _in_row(shape, first - 1, start, min(stop, first * row))
    if first < last:
        rest = (0,) * (len(shape) - 1)
        found.append(((first, *rest), (last - first, *shape[1:])))
    if first <= last and last * row < stop:
        found += _in_row(shape, last, last * row, stop)
    return found


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> list[Box]:
    """Return the boxes of a range that lies in row ``index``."""
    row = math.prod(shape[1:])
    inner = boxes(shape[1:], start - index * row, stop - index * row)
    return [((index, *offset), (1, *sizes)) for offset, sizes in inner]
