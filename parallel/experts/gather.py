"""Values of experts from the ranks that hold them to all ranks of a group, and gradients back.

S experts here, E experts of the group, P ranks, W numbers of an expert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .exchange import Exchange, Splits

Call = Callable[[Callable[[], Tensor]], Tensor]
"""Runs a function that uses the exchange, where and when the path uses it too."""


def gather(values: Tensor, exchange: Exchange, size: int, call: Call) -> Tensor:
    """Return the values of all experts, ``[E, ...]``, in rank order, from ``[S, ...]`` of each.

    ``size`` is the number of ranks; all of them call it. Gradients are summed in rank order.
    """
    rows_EW: Tensor = _Gather.apply(values.flatten(1), exchange, size, call)
    return rows_EW.view(-1, *values.shape[1:])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_SW: Tensor, exchange: Exchange, size: int, call: Call) -> Tensor:
        splits = Splits([[len(own_SW)] * size for _ in range(size)])
        ctx.exchange, ctx.splits, ctx.call = exchange, splits, call
        copies_EW = own_SW.detach().repeat(size, 1)
        return call(lambda: torch.cat(exchange.rows([copies_EW], splits)[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_EW: Tensor) -> tuple[Tensor | None, ...]:
        columns = [grad_EW.detach().contiguous()]

        def summed() -> Tensor:
            parts = ctx.exchange.rows(columns, ctx.splits)[0]
            total_SW = parts[0].clone()
            for part in parts[1:]:
                total_SW += part
            return total_SW

        return ctx.call(summed), None, None, None
