"""What rows chose, as the store and errors want it. N rows, K choices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...moe.routers.routing import Routing


def chosen_experts(routing: Routing) -> list[int]:
    """Return the experts that have rows, in order."""
    return torch.nonzero(routing.counts_E).flatten().tolist()


def rows_that_chose(experts: Sequence[int], experts_NK: Tensor) -> tuple[int, ...]:
    """Return the rows that chose one of ``experts``."""
    has_one_N = torch.isin(experts_NK, torch.tensor(experts)).any(dim=1)
    return tuple(torch.nonzero(has_one_N).flatten().tolist())
