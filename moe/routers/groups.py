"""The groups over which choices and capacity are made: sequences, not what a rank holds.

A rank holds whole sequences of the global batch. So a rule that looks at the rows of one sequence
gives the same choices on any number of ranks.

T tokens, E experts, G groups.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .routing import RouterInput


def group_lengths(router_input: RouterInput, num_rows: int) -> tuple[int, ...]:
    """Return the rows of each sequence; all rows are one if the caller did not say."""
    return (num_rows,) if router_input.lengths is None else router_input.lengths


def previous_rows(values_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the value of the row before in the same sequence; -1 in first rows."""
    firsts_T = torch.zeros_like(values_T, dtype=torch.bool)
    ends = list(accumulate(lengths, initial=0))
    starts = [start for start, end in pairwise(ends) if start < end]
    firsts_T[starts] = True
    return values_T.roll(1).masked_fill(firsts_T, -1)


def groups_of_rows(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 ``[T]``: the number of each row's group."""
    lengths_G = torch.tensor(lengths, dtype=torch.int64, device=device)
    numbers_G = torch.arange(len(lengths), device=device)
    return numbers_G.repeat_interleave(lengths_G, output_size=sum(lengths))


def valid_rows(router_input: RouterInput, num_rows: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the numbers of each sequence's valid rows; not for sequences without any."""
    first = 0
    for length in group_lengths(router_input, num_rows):
        rows = torch.arange(first, first + length, device=device)
        if router_input.valid_T is not None:
            rows = rows[router_input.valid_T[first : first + length]]
        if len(rows):
            yield rows
        first += length
