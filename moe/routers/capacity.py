"""Expert capacity: in training an expert takes a limited number of the rows of each sequence.

Capacity over sequences, and not over what a rank holds, gives the same drops on any number of
ranks. In evaluation nothing is dropped: a token's answer must not depend on its neighbours.

T tokens, E experts, K choices, G groups (sequences), R = K * T choices.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .groups import group_lengths, groups_of_rows
from .linear import LearnedConfig
from .routing import RouterInput, Routing, count_choices


class Capacity(BaseModel):
    """How many rows of a sequence an expert takes in training, and which it drops.

    ``factor * k / E`` of the sequence's tokens, rounded. 1 is just enough for perfect balance. With
    any ``drop`` a token's place depends on later tokens, in training only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    factor: float = Field(default=1.25, gt=0)
    """Rows that an expert takes, as a multiple of its even share. GShard's code leaves k out: its
    2.0 is 1.0 here."""
    drop: Literal["position", "probability", "batch_priority"] = "position"
    """Who gets a place. ``position``: all first choices in order of their tokens, then all second
    ones (GShard, Switch). ``probability``: the choices with the highest scores (Megatron's
    ``probs``). ``batch_priority``: as ``position``, but tokens come in order of their highest score
    (V-MoE)."""
    rounding: Literal["down", "up"] = "down"
    """``down`` as in GShard and Switch, ``up`` as in V-MoE."""
    multiple_of: int = Field(default=1, ge=1)
    """Then up to a multiple of this (V-MoE: 4)."""
    at_least: int = Field(default=1, ge=0)
    """Rows that an expert takes of any sequence (DeepSpeed: 4)."""

    def rows(self, num_tokens: Tensor, k: int, num_experts: int) -> Tensor:
        """Return int64: the rows that an expert takes of groups of ``num_tokens`` tokens."""
        rows = num_tokens.double() * k * self.factor / num_experts
        rows = rows.floor() if self.rounding == "down" else rows.ceil()
        rows = (rows / self.multiple_of).ceil() * self.multiple_of
        return rows.long().clamp(min=self.at_least)

    def most_rows(self, num_tokens: int, k: int, num_experts: int) -> int:
        """Return how many rows of ``num_tokens`` tokens an expert takes at most."""
        return min(num_tokens, int(self.rows(torch.tensor(num_tokens), k, num_experts)))


class LimitedConfig(LearnedConfig):
    """Base of configurations whose router may have a capacity."""

    capacity: Capacity | None = None
    """Limit the rows of each expert in training; null = no limit. Losses and balancing biases count
    choices before drops."""

    def most_rows(self, num_tokens: int, num_experts: int) -> int | None:
        """Return what ``capacity`` lets an expert take, if there is one."""
        if self.capacity is None:
            return None
        return self.capacity.most_rows(num_tokens, self.k, num_experts)


def apply_capacity(
    routing: Routing, scores_TE: Tensor, capacity: Capacity, router_input: RouterInput
) -> None:
    """Drop the choices beyond capacity from ``routing``; see :func:`drop`.

    ``scores_TE`` decide who keeps a place. A replay drops what was dropped when it was recorded.
    Does not wait for the device.
    """
    if router_input.given_TK is not None:
        drop(routing, router_input.given_TK >= 0)
        return
    experts_TK, num_experts = routing.experts_TK, len(routing.counts_E)
    scores_TK = scores_TE.detach().gather(1, experts_TK.clamp(min=0).long())
    drop(routing, _with_a_place(experts_TK, scores_TK, num_experts, capacity, router_input))


def drop(routing: Routing, kept_TK: Tensor) -> None:
    """Take away the choices that are not kept: -1, not counted, with unchanged weights.

    ``extra_counts`` then has ``dropped``, and ``chosen_E`` for balance losses: how many rows chose
    each expert before anything was dropped.
    """
    routing.extra_counts.setdefault("chosen_E", routing.counts_E)
    chosen_E = routing.extra_counts["chosen_E"]
    routing.experts_TK = torch.where(kept_TK, routing.experts_TK, -1)
    routing.counts_E = count_choices(routing.experts_TK, len(chosen_E))
    routing.extra_counts["dropped"] = chosen_E.sum() - routing.counts_E.sum()


def _with_a_place(
    experts_TK: Tensor,
    scores_TK: Tensor,
    num_experts: int,
    capacity: Capacity,
    router_input: RouterInput,
) -> Tensor:
    """Return which choices are kept, bool ``[T, K]``."""
    num_rows, k = experts_TK.shape
    device = experts_TK.device
    lengths = group_lengths(router_input, num_rows)
    group_T = groups_of_rows(lengths, device)
    valid_T = router_input.valid_T
    real_T = torch.ones_like(group_T) if valid_T is None else valid_T.long()
    tokens_G = torch.zeros(len(lengths), dtype=torch.int64, device=device)
    tokens_G = tokens_G.scatter_add(0, group_T, real_T)
    rows_G = capacity.rows(tokens_G, k, num_experts)
    # A cell is an expert in a group. Rows without a choice come to a last cell, which has no place.
    cell_TK = group_T.unsqueeze(1) * num_experts + experts_TK
    cell_TK = torch.where(experts_TK >= 0, cell_TK, len(lengths) * num_experts)
    rows_of_cell = torch.cat((rows_G.repeat_interleave(num_experts), rows_G.new_zeros(1)))
    order_R = _order(scores_TK, capacity.drop)
    cells_R, within_R = cell_TK.T.reshape(-1)[order_R].sort(stable=True)
    first_R = torch.searchsorted(cells_R, cells_R)
    place_R = torch.arange(len(cells_R), device=device) - first_R
    has_place_R = place_R < rows_of_cell[cells_R]
    kept_R = torch.zeros_like(has_place_R).scatter(0, order_R[within_R], has_place_R)
    return kept_R.view(k, num_rows).T


def _order(scores_TK: Tensor, drop: str) -> Tensor:
    """Return the choices in the order in which they get places, int64 ``[R]``.

    Choice c of token t has the number ``c * T + t``. Equal scores keep the order of these numbers.
    """
    num_rows, k = scores_TK.shape
    device = scores_TK.device
    if drop == "probability":
        return scores_TK.T.reshape(-1).argsort(descending=True, stable=True)
    if drop == "position":
        return torch.arange(k * num_rows, device=device)
    tokens_T = scores_TK.amax(dim=1).argsort(descending=True, stable=True)
    return (torch.arange(k, device=device).unsqueeze(1) * num_rows + tokens_T).flatten()
