"""What rows chose, as the store and errors want it. N rows, K choices."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.routers.routing import Routing
from ...moe.routes.rows import Array


class Choice(NamedTuple):
    """What a layer's experts are called with."""

    x_ND: Tensor | None
    """None in a replay of recorded routes."""
    experts_NK: Array
    """-1 = none."""


def chosen_experts(routing: Routing) -> list[int]:
    """Return the experts that have rows, in order."""
    return torch.nonzero(routing.counts_E).flatten().tolist()


def count_rows(experts_NK: Tensor) -> dict[int, int]:
    """Return how many choices each expert has, in order; -1 is none."""
    counts = Counter(experts_NK.flatten().tolist())
    return {expert: counts[expert] for expert in sorted(counts) if expert >= 0}


def rows_that_chose(experts: Sequence[int], experts_NK: Tensor) -> tuple[int, ...]:
    """Return the rows that chose one of ``experts``."""
    has_one_N = torch.isin(experts_NK, torch.tensor(experts)).any(dim=1)
    return tuple(torch.nonzero(has_one_N).flatten().tolist())
