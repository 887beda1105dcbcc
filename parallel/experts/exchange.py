"""All-to-all of rows between the ranks of a group: through shared memory on one host, else gloo.

P ranks of the group, C chunks. Every rank takes part in every exchange, even with zero rows.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..host.group import HostGroup
from ..host.shared_memory import share
from ..watch.pulse import pulse

COUNTS, ROWS = "the exchange of how many rows travel", "the exchange of rows with experts"
"""Names of collectives, for sentences about ranks that are missed."""
ALIGNMENT = 64
"""Bytes of a cache line, where every column begins."""
SLACK = 1.5
"""Factor on the requested size, so that uneven loads seldom need to grow the memory again."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows that each rank sends to each: ``rows_PP[source][destination]``."""

    rows_PP: list[list[int]]

    def sent_by(self, rank: int) -> list[int]:
        """Return the rows ``rank`` sends to each rank."""
        return self.rows_PP[rank]

    def received_by(self, rank: int) -> list[int]:
        """Return the rows ``rank`` receives from each rank."""
        return [row[rank] for row in self.rows_PP]

    def reversed(self) -> "Splits":
        """Return the splits for sending results back."""
        return Splits([list(column) for column in zip(*self.rows_PP, strict=True)])


def to_host(*numbers: Tensor) -> list[list[int]]:
    """Return int64 tensors of one shape as numbers: the host waits once for a GPU."""
    found: list[list[int]] = torch.stack(numbers).tolist()
    return found


def places(is_true: Tensor, count: int) -> Tensor:
    """Return the indices of ``count`` true elements, ``[count, dimensions]``, in their order.

    The host does not wait for a GPU to count them, as ``nonzero`` does.
    """
    return torch.nonzero_static(is_true, size=count)


class Exchange(Protocol):
    """Moves rows between the ranks of a group."""

    def splits(self, send_CP: list[list[int]]) -> list[Splits]:
        """Tell all ranks how many rows of each chunk this one sends to each rank."""
        ...

    def rows(
        self, columns: list[Tensor], splits: Splits, order: Tensor | None = None
    ) -> list[list[Tensor]]:
        """Send rows of several tensors and return, for each, what every rank sent here.

        ``columns`` are 2-D; their rows (those that ``order`` names, if given) are sorted by
        destination. The next exchange may overwrite the result, so use or copy it first.
        """
        ...


def open_exchange(group: dist.ProcessGroup, host: HostGroup | None) -> Exchange:
    """Return the exchange of a group; ``host`` is set if its ranks share one host, on the CPU."""
    return GroupExchange(group) if host is None else SharedExchange(host)


class GroupExchange:
    """Through the group's own collectives, in one message of bytes to each rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)

    @pulse.in_collective(COUNTS)
    def splits(self, send_CP: list[list[int]]) -> list[Splits]:
        """See :class:`Exchange`."""
        mine = torch.tensor(send_CP, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self._size)]
        dist.all_gather(everyone, mine, group=self._group)
        return [Splits(rows_PP) for rows_PP in torch.stack(everyone, dim=1).tolist()]

    @pulse.in_collective(ROWS)
    def rows(
        self, columns: list[Tensor], splits: Splits, order: Tensor | None = None
    ) -> list[list[Tensor]]:
        """See :class:`Exchange`."""
        if order is not None:
            columns = [column.index_select(0, order) for column in columns]
        packed = torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)
        sent, received = splits.sent_by(self._rank), splits.received_by(self._rank)
        arrived = packed.new_empty(sum(received), packed.shape[1])
        dist.all_to_all_single(arrived, packed, received, sent, group=self._group)
        widths = [column.shape[1] * column.element_size() for column in columns]
        parts = arrived.split(widths, dim=1)
        # contiguous() would leave a single row where it is, unaligned.
        own = torch.contiguous_format
        return [
            list(part.clone(memory_format=own).view(column.dtype).split(received))
            for part, column in zip(parts, columns, strict=True)
        ]


class SharedExchange:
    """Through shared memory: each rank writes what it sends, and the others read it there.

    Turns alternate between two halves of the memory, so one barrier a turn is enough. Before a rank
    writes to a half again, it passes the barrier of the turn in between. The others reach that
    barrier only after they have read the half.
    """

    def __init__(self, host: HostGroup) -> None:
        self._host = host
        self._turn = 0
        self._room = 0
        """Bytes of a half."""
        self._parts: list[Tensor] = []
        self._otherwise: GroupExchange | None = None

    @pulse.in_collective(COUNTS)
    def splits(self, send_CP: list[list[int]]) -> list[Splits]:
        """See :class:`Exchange`."""
        size = self._host.size
        mine = torch.tensor(send_CP, dtype=torch.int64)
        everyone = Splits([[1] * size for _ in range(size)])
        received = self.rows([mine.view(1, -1).expand(size, -1)], everyone)[0]
        counts_PCP = torch.cat(received).view(size, *mine.shape)
        return [Splits(rows_PP) for rows_PP in counts_PCP.transpose(0, 1).tolist()]

    @pulse.in_collective(ROWS)
    def rows(
        self, columns: list[Tensor], splits: Splits, order: Tensor | None = None
    ) -> list[list[Tensor]]:
        """See :class:`Exchange`."""
        self._make_room(columns, splits)
        if self._otherwise is not None:
            return self._otherwise.rows(columns, splits, order)
        rank = self._host.rank
        for column, place in zip(columns, self._places(columns, splits, rank), strict=True):
            if order is None:
                place.copy_(column)
            else:
                torch.index_select(column, 0, order, out=place)
        self._host.barrier()
        received: list[list[Tensor]] = [[] for _ in columns]
        for source in range(self._host.size):
            places = self._places(columns, splits, source)
            for parts, place in zip(received, places, strict=True):
                parts.append(place.split(splits.sent_by(source))[rank])
        self._turn += 1
        return received

    def _places(self, columns: list[Tensor], splits: Splits, rank: int) -> list[Tensor]:
        """Return where ``rank`` writes its rows of each column this turn."""
        num_rows = sum(splits.sent_by(rank))
        start = self._turn % 2 * self._room
        places = []
        for column in columns:
            num_bytes = num_rows * column.shape[1] * column.element_size()
            part = self._parts[rank][start : start + num_bytes]
            places.append(part.view(column.dtype).view(num_rows, column.shape[1]))
            start += _aligned(num_bytes)
        return places

    def _make_room(self, columns: list[Tensor], splits: Splits) -> None:
        """Share more memory if this turn needs it; all ranks decide the same."""
        most = max(sum(splits.sent_by(rank)) for rank in range(self._host.size))
        needed = sum(_aligned(most * c.shape[1] * c.element_size()) for c in columns)
        if needed <= self._room or self._otherwise is not None:
            return
        self._room = _aligned(int(needed * SLACK))
        parts = share(2 * self._room, self._host.group)
        if parts is None:
            self._otherwise = GroupExchange(self._host.group)
        else:
            self._parts = parts


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
