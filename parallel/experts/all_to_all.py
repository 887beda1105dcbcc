"""Move tokens to the ranks that hold their experts with all-to-all, and the results back.

T tokens here, D model width, K choices, P ranks of the expert-parallel group, N rows received.

One copy of a token goes to each rank that holds at least one of its experts. Its routing weights
travel with it and are applied there, and their gradient travels back. Every rank takes part in
every exchange, even with zero rows, so no rank waits for a collective that never comes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...moe.experts.base import LayerExperts
from ...moe.experts.path import Beside
from ...moe.routers.routing import Routing
from ..mesh import Mesh
from .exchange import Exchange, Splits, places, to_host
from .gather import gather


@dataclass(frozen=True, slots=True)
class _Handle:
    tokens: Tensor
    """int64: the token of each row sent, by destination rank, then by token."""
    splits: Splits
    num_choices: int
    """Choices of the rows received that are experts here."""
    num_tokens: int
    exchange: Exchange
    rank: int

    def sum_parts(self, parts: list[Tensor]) -> Tensor:
        """Add what every rank returned for its tokens, in rank order; ``[T, width]``."""
        total = parts[0].new_zeros(self.num_tokens, parts[0].shape[1])
        tokens = self.tokens.split(self.splits.sent_by(self.rank))
        for tokens_n, part in zip(tokens, parts, strict=True):
            # One rank's tokens are distinct, so this sum has one order only.
            total.index_add_(0, tokens_n, part)
        return total


class _Send(torch.autograd.Function):
    """Rows, routing weights and expert ids out; gradients of rows and weights back."""

    @staticmethod
    def forward(ctx, x_TD, weights_TK, experts_TK, handle):  # type: ignore[no-untyped-def]
        ctx.handle = handle
        columns = [x_TD, weights_TK, experts_TK]
        received = handle.exchange.rows(columns, handle.splits, handle.tokens)
        x_ND, weights_NK, experts_NK = (torch.cat(parts) for parts in received)
        ctx.mark_non_differentiable(experts_NK)
        return x_ND, weights_NK, experts_NK

    @staticmethod
    def backward(ctx, grad_x_ND, grad_weights_NK, _):  # type: ignore[no-untyped-def]
        handle = ctx.handle
        columns = [grad_x_ND, grad_weights_NK]
        received = handle.exchange.rows(columns, handle.splits.reversed())
        grad_x_TD, grad_weights_TK = (handle.sum_parts(parts) for parts in received)
        return grad_x_TD, grad_weights_TK, None, None


class _Return(torch.autograd.Function):
    """Results back, summed; their gradient out again."""

    @staticmethod
    def forward(ctx, y_ND, handle):  # type: ignore[no-untyped-def]
        ctx.handle = handle
        return handle.sum_parts(handle.exchange.rows([y_ND], handle.splits.reversed())[0])

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        handle = ctx.handle
        return torch.cat(handle.exchange.rows([grad_TD], handle.splits, handle.tokens)[0]), None


class AllToAllPath:
    """Rows travel over the expert-parallel group; expert e lives on rank ``e // (E / P)``.

    Layers share one ``exchange``: their turns follow each other on every rank.
    """

    def __init__(self, num_experts: int, mesh: Mesh, exchange: Exchange) -> None:
        self._exchange = exchange
        self._rank = mesh.ep_rank
        self._num_ranks = mesh.ep_size
        self._share = num_experts // self._num_ranks

    def gather(self, values: Tensor) -> Tensor:
        """See :class:`moeyard.moe.experts.path.ExpertPath`."""
        return gather(values, self._exchange, self._num_ranks, lambda call: call())

    def run(
        self, x_TD: Tensor, routing: Routing, experts: LayerExperts, beside: Beside | None = None
    ) -> Tensor:
        """See :class:`moeyard.moe.experts.path.ExpertPath`; parts are added in rank order."""
        x_ND, experts_NK, weights_NK, handle = self._dispatch(x_TD, routing)
        y_ND = experts(x_ND, experts_NK, weights_NK, handle.num_choices)
        y_TD: Tensor = _Return.apply(y_ND, handle)
        return y_TD if beside is None else y_TD + beside()

    def _dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, _Handle]:
        """Return the rows that arrive here, x_ND, experts_NK (-1 = not here) and weights_NK.

        The handle brings their results back.
        """
        experts_TK = routing.experts_TK
        owner_TK = torch.div(experts_TK, self._share, rounding_mode="floor")
        ranks_P = torch.arange(self._num_ranks, device=x_TD.device)
        is_there_PTK = owner_TK.unsqueeze(0) == ranks_P.view(-1, 1, 1)
        wanted_PT = is_there_PTK.any(dim=-1)
        rows_P, choices_P = to_host(wanted_PT.sum(dim=1), is_there_PTK.sum(dim=(1, 2)))
        tokens = places(wanted_PT, sum(rows_P))[:, 1]
        splits, choices = self._exchange.splits([rows_P, choices_P])
        num_choices = sum(choices.received_by(self._rank))
        handle = _Handle(tokens, splits, num_choices, x_TD.shape[0], self._exchange, self._rank)
        x_ND, weights_NK, experts_NK = _Send.apply(x_TD, routing.weights_TK, experts_TK, handle)
        here_NK = torch.div(experts_NK, self._share, rounding_mode="floor") == self._rank
        return x_ND, torch.where(here_NK, experts_NK, -1), weights_NK, handle
