"""Losses on the squared coefficient of variation of importance and load (Shazeer et al. 2017).

T tokens, E experts, K choices.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .loss_terms import GlobalCounts, training_sum
from .routing import Routing
from .whole_batch import from_fixed_point, share_of, to_fixed_point

EPSILON = 1e-10
"""Keeps the loss finite where all sums are zero (tensor2tensor)."""


class Scores(NamedTuple):
    """Logits before and after noise, and its standard deviation."""

    clean_TE: Tensor
    noisy_TE: Tensor
    std_TE: Tensor


def squared_variation(sums_E: Tensor) -> Tensor:
    """Return ``var / mean^2`` over the experts, with the unbiased variance."""
    if len(sums_E) == 1:
        return sums_E.sum() * 0
    return sums_E.var() / (sums_E.mean().square() + EPSILON)


def add_sums(routing: Routing, name: str, values_TE: Tensor, valid_T: Tensor | None) -> None:
    """Store the sums over this rank's valid rows for :func:`variation_loss`."""
    if valid_T is not None:
        values_TE = torch.where(valid_T.unsqueeze(1), values_TE, 0)
    sums_E = values_TE.sum(dim=0)
    routing.extras[name] = sums_E
    routing.extra_counts[name] = to_fixed_point(sums_E)


def variation_loss(routing: Routing, counts: GlobalCounts, name: str) -> Tensor:
    """Return this rank's share of the squared variation of ``name`` over the global batch."""
    here_E = training_sum(routing, name)
    whole_E = from_fixed_point(counts.extra[name], here_E.dtype)
    part = routing.num_tokens.to(here_E) / counts.num_tokens.clamp(min=1)
    return share_of(squared_variation, here_E, whole_E, part)


def weights_by_expert(routing: Routing, num_experts: int) -> Tensor:
    """Return each token's weight of every expert, ``[T, E]``, 0 for those that it did not choose.

    Rows that are not valid have numbers without meaning.
    """
    chosen_TK = routing.experts_TK.clamp(min=0).long()
    weights_TE = routing.weights_TK.new_zeros(len(chosen_TK), num_experts)
    return weights_TE.scatter_add(1, chosen_TK, routing.weights_TK)


def chance_above_rivals(
    clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, chosen_TK: Tensor
) -> Tensor:
    """Return the chance that each expert is chosen if only its own noise is drawn again.

    ``Phi((clean - threshold) / std)``; the threshold is the best k-th value among the other
    experts (Shazeer et al. 2017, eq. 8-9). With k = E it is 1, without gradient. ``chosen_TK`` are
    the ids of the k best noisy values.
    """
    if chosen_TK.shape[1] == clean_TE.shape[1]:
        return torch.ones_like(clean_TE)
    is_chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    rivals_TE = noisy_TE.masked_fill(is_chosen_TE, -torch.inf)
    best_rival_T1 = rivals_TE.max(dim=1, keepdim=True).values
    worst_chosen_T1 = noisy_TE.gather(1, chosen_TK).min(dim=1, keepdim=True).values
    threshold_TE = torch.where(is_chosen_TE, best_rival_T1, worst_chosen_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE)


def chance_above_kth(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, k: int) -> Tensor:
    """Return ``Phi((clean - threshold) / std)`` with the k-th best noisy value as threshold.

    The load of V-MoE: one threshold for all experts of a token.
    """
    threshold_T1 = noisy_TE.topk(k, dim=1).values[:, -1:]
    return torch.special.ndtr((clean_TE - threshold_T1) / std_TE)
