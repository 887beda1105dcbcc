"""Every rank sends C rows for each expert to its rank, however many there are: padded all-to-all.

A router with a capacity gives an expert at most C of a rank's rows, and C is known before it
chooses. So ranks tell each other no counts, and no size depends on a choice: the host never waits
for a GPU to learn one. Nothing is lost: each choice that the router kept has a place. Places that
are left over travel empty, and experts skip them (GShard, DeepSpeed, Tutel; Megatron's
``moe_pad_expert_input_to_capacity``). Evaluation has no capacity, and takes the plain all-to-all.

T tokens here, D model width, K choices, E experts, P ranks, C places of an expert on each rank,
M = E * C places here. M rows arrive: from each of P ranks C rows for each of E / P experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import ConfigError
from ...kernels.values.grouping import group_tokens
from ...moe.experts.base import LayerExperts
from ...moe.experts.path import Beside
from ...moe.routers.routing import Routing
from ..mesh import Mesh
from .all_to_all import AllToAllPath
from .exchange import Exchange, Splits


@dataclass(frozen=True, slots=True)
class Places:
    """Where the choices of a rank's rows are among the places of all experts."""

    choice_M: Tensor
    """int64: the choice at each place, k of token t being t * K + k; T * K = none."""
    place_TK: Tensor
    """int64: the place of each choice, by expert, then by token; M = none."""

    @classmethod
    def of(cls, experts_TK: Tensor, num_experts: int, capacity: int) -> "Places":
        """Give each choice (-1 = none) a place. Does not wait for a GPU.

        Raises :class:`ConfigError` if an expert has more than ``capacity`` rows; on a GPU, the
        device stops with the same sentence.
        """
        grouping = group_tokens(experts_TK, num_experts)
        ids_R = experts_TK.reshape(-1).long()
        within_R = grouping.inverse_R - grouping.offsets_E1[ids_R.clamp(min=0)]
        _check(((within_R < capacity) | (ids_R < 0)).all(), capacity)
        num_places = num_experts * capacity
        place_R = torch.where(ids_R < 0, num_places, ids_R * capacity + within_R)
        choices_R = torch.arange(len(ids_R), device=ids_R.device)
        choice_M1 = torch.full((num_places + 1,), len(ids_R), device=ids_R.device)
        choice_M1.scatter_(0, place_R, choices_R)  # the last place is for those without one
        return cls(choice_M1[:-1], place_R.view_as(experts_TK))

    def spread(self, rows_TD: Tensor) -> Tensor:
        """Return the row of each place, ``[M, D]``; zeros if there is none."""
        tokens_M = self.choice_M // self.place_TK.shape[1]
        return F.pad(rows_TD, (0, 0, 0, 1)).index_select(0, tokens_M)

    def fold(self, rows_MD: Tensor) -> Tensor:
        """Return the sum of each token's places in the order of k, ``[T, D]``."""
        wide = torch.promote_types(rows_MD.dtype, torch.float32)
        padded_M1D = F.pad(rows_MD, (0, 0, 0, 1))
        first_T, *others = self.place_TK.unbind(dim=1)
        total_TD = padded_M1D.index_select(0, first_T).to(wide)
        for place_T in others:
            total_TD += padded_M1D.index_select(0, place_T)
        return total_TD.to(rows_MD.dtype)

    def spread_choices(self, values_TK: Tensor, none: float) -> Tensor:
        """Return the value of the choice at each place, ``[M, 1]``; ``none`` if there is none."""
        values_R = F.pad(values_TK.reshape(-1), (0, 1), value=none)
        return values_R[self.choice_M].unsqueeze(1)

    def fold_choices(self, values_M1: Tensor) -> Tensor:
        """Return the value at the place of each choice, ``[T, K]``; 0 if it has none."""
        return F.pad(values_M1.squeeze(1), (0, 1))[self.place_TK]


def _check(fits: Tensor, capacity: int) -> None:
    """Raise unless ``fits``; a GPU checks it later, in its own time."""
    problem = (
        f"an expert got more than {capacity} rows of a rank, which is what the router's most_rows "
        "allows; correct most_rows or use parallel.path: all_to_all."
    )
    if fits.device.type != "cpu":
        torch._assert_async(fits, problem)
    elif not bool(fits):
        raise ConfigError(problem)


@dataclass(frozen=True, slots=True)
class _Trip:
    places: Places
    exchange: Exchange
    splits: Splits

    def swap(self, columns: list[Tensor]) -> list[Tensor]:
        """Exchange M rows with the other ranks; there and back are the same."""
        return [torch.cat(parts) for parts in self.exchange.rows(columns, self.splits)]


class _Send(torch.autograd.Function):
    """Rows, routing weights and expert ids out; gradients of rows and weights back."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, trip: _Trip
    ) -> tuple[Tensor, ...]:
        ctx.trip, places = trip, trip.places
        weights_M1 = places.spread_choices(weights_TK, 0)
        experts_M1 = places.spread_choices(experts_TK, -1)
        x_MD, weights_M1, experts_M1 = trip.swap([places.spread(x_TD), weights_M1, experts_M1])
        ctx.mark_non_differentiable(experts_M1)
        return x_MD, weights_M1, experts_M1

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x_MD: Tensor, grad_weights_M1: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        places = ctx.trip.places
        grad_x_MD, grad_weights_M1 = ctx.trip.swap([grad_x_MD, grad_weights_M1])
        return places.fold(grad_x_MD), places.fold_choices(grad_weights_M1), None, None


class _Return(torch.autograd.Function):
    """Results back, summed; their gradient out again."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.places.fold(trip.swap([y_MD])[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.swap([ctx.trip.places.spread(grad_TD)])[0], None


class PaddedPath:
    """Rows travel over the expert-parallel group; expert e lives on rank ``e // (E / P)``.

    ``capacity`` is C, the same on all ranks. Layers share one ``exchange``.
    """

    def __init__(self, num_experts: int, mesh: Mesh, exchange: Exchange, capacity: int) -> None:
        self._num_experts, self._exchange, self._capacity = num_experts, exchange, capacity
        size = mesh.ep_size
        rows = num_experts // size * capacity
        self._splits = Splits([[rows] * size for _ in range(size)])
        self._plain = AllToAllPath(num_experts, mesh, exchange)

    def gather(self, values: Tensor) -> Tensor:
        """See :class:`moeyard.moe.experts.path.ExpertPath`."""
        return self._plain.gather(values)

    def run(
        self, x_TD: Tensor, routing: Routing, experts: LayerExperts, beside: Beside | None = None
    ) -> Tensor:
        """See :class:`moeyard.moe.experts.path.ExpertPath`; choices are added in their order."""
        if not experts.training:
            return self._plain.run(x_TD, routing, experts, beside)
        places = Places.of(routing.experts_TK, self._num_experts, self._capacity)
        trip = _Trip(places, self._exchange, self._splits)
        sent = (x_TD, routing.weights_TK, routing.experts_TK)
        x_MD, weights_M1, experts_M1 = _Send.apply(*sent, trip)
        y_TD: Tensor = _Return.apply(experts(x_MD, experts_M1, weights_M1), trip)
        return y_TD if beside is None else y_TD + beside()
