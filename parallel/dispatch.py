"""Move tokens to the ranks that hold their experts with all-to-all, and the results back.

T tokens here, D model width, K choices, P ranks of the expert-parallel group, N rows received.

One copy of a token goes to each rank that holds at least one of its experts. Its routing weights
travel with it and are applied there, and their gradient travels back. Every rank takes part in
every exchange, with zero rows if need be, so nobody waits for a collective that never comes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.routing import Routing


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows this rank sends to and receives from each rank of the group."""

    send_P: list[int]
    receive_P: list[int]

    def reversed(self) -> "Splits":
        """Return the splits of the way back."""
        return Splits(self.receive_P, self.send_P)


def exchange_rows(columns: list[Tensor], splits: Splits, group: dist.ProcessGroup) -> list[Tensor]:
    """Send the rows of several tensors to their ranks in one all-to-all of bytes.

    Each tensor is ``[sum(send_P), width]``; the results are ``[sum(receive_P), width]``.
    """
    packed = torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)
    received = packed.new_empty(sum(splits.receive_P), packed.shape[1])
    dist.all_to_all_single(received, packed, splits.receive_P, splits.send_P, group=group)
    widths = [column.shape[1] * column.element_size() for column in columns]
    parts = received.split(widths, dim=1)
    return [
        part.contiguous().view(column.dtype) for part, column in zip(parts, columns, strict=True)
    ]


class _Send(torch.autograd.Function):
    """Rows, expert ids and routing weights out; gradients of rows and weights back."""

    @staticmethod
    def forward(ctx, x, weights, experts, splits, group):  # type: ignore[no-untyped-def]
        ctx.splits, ctx.group = splits, group
        x_out, weights_out, experts_out = exchange_rows([x, weights, experts], splits, group)
        ctx.mark_non_differentiable(experts_out)
        return x_out, weights_out, experts_out

    @staticmethod
    def backward(ctx, grad_x, grad_weights, _):  # type: ignore[no-untyped-def]
        grads = exchange_rows([grad_x, grad_weights], ctx.splits.reversed(), ctx.group)
        return grads[0], grads[1], None, None, None


class _Return(torch.autograd.Function):
    """Results back; their gradient out again."""

    @staticmethod
    def forward(ctx, y, splits, group):  # type: ignore[no-untyped-def]
        ctx.splits, ctx.group = splits, group
        return exchange_rows([y], splits.reversed(), group)[0]

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        return exchange_rows([grad_y], ctx.splits, ctx.group)[0], None, None


@dataclass(frozen=True, slots=True)
class _Handle:
    tokens: Tensor
    """int64: the token of each row sent, by destination rank, then by token."""
    splits: Splits
    num_tokens: int


class AllToAllDispatcher:
    """Dispatch over the expert-parallel group; expert e lives on rank ``e // (E / P)``."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self._group = group
        self._num_ranks = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._share = num_experts // self._num_ranks

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, Any]:
        """See :class:`moeyard.moe.layer.Dispatcher`."""
        experts_TK = routing.experts_TK
        owner_TK = torch.div(experts_TK, self._share, rounding_mode="floor")
        ranks_P = torch.arange(self._num_ranks, device=x_TD.device)
        wanted_PT = (owner_TK.unsqueeze(0) == ranks_P.view(-1, 1, 1)).any(dim=-1)
        tokens = torch.nonzero(wanted_PT)[:, 1]
        splits = self._exchange_counts(wanted_PT.sum(dim=1))
        x_ND, weights_NK, experts_NK = _Send.apply(
            x_TD[tokens], routing.weights_TK[tokens], experts_TK[tokens], splits, self._group
        )
        here_NK = torch.div(experts_NK, self._share, rounding_mode="floor") == self._rank
        experts_NK = torch.where(here_NK, experts_NK, -1)
        return x_ND, experts_NK, weights_NK, _Handle(tokens, splits, x_TD.shape[0])

    def combine(self, y_ND: Tensor, handle: Any) -> Tensor:
        """See :class:`moeyard.moe.layer.Dispatcher`; parts are added in rank order."""
        parts = _Return.apply(y_ND, handle.splits, self._group)
        y_TD = parts.new_zeros(handle.num_tokens, parts.shape[1])
        start = 0
        for count in handle.splits.send_P:
            # One rank's tokens are distinct, so this sum has one order only.
            rows = slice(start, start + count)
            y_TD = y_TD.index_add(0, handle.tokens[rows], parts[rows])
            start += count
        return y_TD

    def _exchange_counts(self, send_P: Tensor) -> Splits:
        receive_P = torch.empty_like(send_P)
        dist.all_to_all_single(receive_P, send_P, group=self._group)
        return Splits(send_P.tolist(), receive_P.tolist())
