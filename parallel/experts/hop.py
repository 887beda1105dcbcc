"""One hop of rows between the ranks of a group, in chunks, and the way back.

T rows here, K choices, P ranks of the group, C chunks, N copies received.

A copy of a row goes to every rank that wants it. Several chunks may share one message. Every rank
takes part in every exchange, even with zero rows, so no rank waits for a message that never comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .exchange import Exchange, Splits, places, to_host

RankOf = Callable[[Tensor], Tensor]
"""From expert ids to the expert-parallel rank that computes each, -1 for -1."""


def _same(ranks: Tensor) -> Tensor:
    return ranks


@dataclass(frozen=True, slots=True)
class Level:
    """A group of ranks between which rows travel, and who wants which row."""

    exchange: Exchange
    rank: int
    size: int
    rank_of: RankOf
    member_of: Callable[[Tensor], Tensor] = _same
    """From expert-parallel ranks to numbers in this group; others than 0 to P - 1 = none."""
    to_all: bool = False
    """Whether every rank gets every row (all-gather), or only those that its experts need."""
    has_slices: bool = False
    """Whether every rank has a slice of each expert (expert tensor parallelism), and so computes a
    part of each row's sum. Goes with ``to_all``."""

    def plan(self, experts: Sequence[Tensor]) -> list["Hop"]:
        """Agree with the other ranks how rows with these experts travel.

        ``experts`` are ``[T, K]`` for each chunk, as many chunks on every rank.
        """
        found, rows_CP, choices_CP = [], [], []
        for experts_TK in experts:
            rank_TK = self.member_of(self.rank_of(experts_TK))
            ranks_P = torch.arange(self.size, device=experts_TK.device)
            is_there_PTK = rank_TK == ranks_P.view(-1, 1, 1)
            if self.has_slices:
                is_there_PTK = (experts_TK >= 0).expand_as(is_there_PTK)
            wanted_PT = is_there_PTK.any(dim=-1)
            if self.to_all:
                wanted_PT = torch.ones_like(wanted_PT)
            rows_P, choices_P = to_host(wanted_PT.sum(dim=1), is_there_PTK.sum(dim=(1, 2)))
            ranks_M, rows_M = places(wanted_PT, sum(rows_P)).unbind(dim=1)
            experts_MK = torch.where(is_there_PTK[ranks_M, rows_M], experts_TK[rows_M], -1)
            found.append((rows_M, experts_MK))
            rows_CP.append(rows_P)
            choices_CP.append(choices_P)
        splits = self.exchange.splits([*rows_CP, *choices_CP])
        return [
            Hop(self, *sent, rows, sum(choices.received_by(self.rank)), len(experts_TK))
            for sent, rows, choices, experts_TK in zip(
                found, splits[: len(experts)], splits[len(experts) :], experts, strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class Hop:
    """How one chunk of rows travels over a level."""

    level: Level
    rows_M: Tensor
    """int64: the row of each copy sent, by destination rank, then by row."""
    experts_MK: Tensor
    """The experts of each copy at its destination, -1 = none."""
    splits: Splits
    num_choices: int
    """Choices of the copies received that name an expert."""
    num_rows: int
    """Rows that the copies sent are of."""

    @property
    def sent_P(self) -> list[int]:
        """Copies sent to each rank."""
        return self.splits.sent_by(self.level.rank)

    @property
    def received_P(self) -> list[int]:
        """Copies received from each rank."""
        return self.splits.received_by(self.level.rank)

    def add_up(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the sum of what came back for each row, in the order of ranks."""
        total = parts[0].new_zeros(self.num_rows, parts[0].shape[1])
        for rows, part in zip(self.rows_M.split(self.sent_P), parts, strict=True):
            # Rows sent to one rank are distinct, so this sum has one order only.
            total.index_add_(0, rows, part)
        return total


Columns = list[Tensor]
"""2-D tensors that share their rows."""


@torch.no_grad()
def send(hops: Sequence[Hop], chunks: Sequence[Columns], with_experts: bool) -> list[Columns]:
    """Send the rows of several chunks in one message; return what arrived here, by chunk.

    With ``with_experts`` the experts of each copy are its last column.
    """
    copies = [
        [column[hop.rows_M] for column in chunk] for hop, chunk in zip(hops, chunks, strict=True)
    ]
    if with_experts:
        copies = [[*chunk, hop.experts_MK] for hop, chunk in zip(hops, copies, strict=True)]
    packed = _by_rank_then_chunk(copies, [hop.sent_P for hop in hops])
    received = hops[0].level.exchange.rows(packed, _together(hops))
    parts = _by_chunk(received, [hop.received_P for hop in hops])
    return [[torch.cat(of_ranks) for of_ranks in chunk] for chunk in parts]


@torch.no_grad()
def send_back(hops: Sequence[Hop], chunks: Sequence[Columns]) -> list[Columns]:
    """Send values of the copies that arrived here back, and return the sums for the rows sent."""
    packed = _by_rank_then_chunk(chunks, [hop.received_P for hop in hops])
    received = hops[0].level.exchange.rows(packed, _together(hops).reversed())
    parts = _by_chunk(received, [hop.sent_P for hop in hops])
    return [
        [hop.add_up(of_ranks) for of_ranks in chunk] for hop, chunk in zip(hops, parts, strict=True)
    ]


def _together(hops: Sequence[Hop]) -> Splits:
    """Return the splits of a message with all chunks."""
    size = hops[0].level.size
    return Splits(
        [[sum(h.splits.rows_PP[a][b] for h in hops) for b in range(size)] for a in range(size)]
    )


def _by_rank_then_chunk(chunks: Sequence[Columns], sizes_CP: Sequence[list[int]]) -> Columns:
    """Bring columns, whose rows are by chunk and then by rank, into the order of one message."""
    if len(chunks) == 1:
        return chunks[0]
    packed = []
    for column in range(len(chunks[0])):
        parts = [chunk[column].split(sizes) for chunk, sizes in zip(chunks, sizes_CP, strict=True)]
        packed.append(torch.cat([part[rank] for rank in range(len(sizes_CP[0])) for part in parts]))
    return packed


def _by_chunk(
    received: Sequence[Sequence[Tensor]], sizes_CP: Sequence[list[int]]
) -> list[list[list[Tensor]]]:
    """Return the parts of every rank, by chunk and column, of a message that came in."""
    parts: list[list[list[Tensor]]] = [[[] for _ in received] for _ in sizes_CP]
    for column, of_ranks in enumerate(received):
        for rank, message in enumerate(of_ranks):
            pieces = message.split([sizes[rank] for sizes in sizes_CP])
            for chunk, piece in enumerate(pieces):
                parts[chunk][column].append(piece)
    return parts
