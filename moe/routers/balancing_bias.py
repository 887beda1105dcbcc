"""How a balancing bias moves after a step: by the sign of the load, or to a quantile of scores.

T tokens, E experts, K choices, B bins of a histogram.
"""

import torch
from torch import Tensor

from .loss_terms import GlobalCounts
from .routing import Routing

BINS = 512
"""Bins of a histogram of margins. They are narrow near 0, where quantiles of softmax scores are:
7% of a margin of 0.004, which is a score of 1/256."""


def toward_even_load(counts: GlobalCounts) -> Tensor:
    """Return 1 for experts with less than the mean load, -1 for those with more, fp64 ``[E]``.

    Wang et al. 2024, algorithm 1. Choices count that capacity has dropped.
    """
    load_E = counts.chosen_E.double()
    return (load_E.mean() - load_E).sign()


def add_margins(
    routing: Routing, scores_TE: Tensor, bias_E: Tensor, k: int, valid_T: Tensor | None
) -> None:
    """Store a histogram of each expert's margins for :func:`even_bias`.

    An expert's margin at a token is its score, less the best k+1st score with bias. The token
    chooses the expert if the margin is above ``-bias``, whatever that bias is.
    """
    scores_TE = scores_TE.detach()
    rival_T1 = (scores_TE + bias_E).topk(k + 1, dim=1).values[:, -1:]
    margins_TE = scores_TE - rival_T1
    roots_TE = margins_TE.sign() * margins_TE.abs().pow(1 / 3)
    bins_TE = ((roots_TE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    num_tokens, num_experts = scores_TE.shape
    if valid_T is None:
        valid_T = torch.ones(num_tokens, dtype=torch.bool, device=scores_TE.device)
    cells_TE = bins_TE + torch.arange(num_experts, device=bins_TE.device) * BINS
    counted_TE = valid_T.long().unsqueeze(1).expand(-1, num_experts)
    counts = torch.zeros(num_experts * BINS, dtype=torch.int64, device=bins_TE.device)
    counts.scatter_add_(0, cells_TE.flatten(), counted_TE.flatten())
    routing.extra_counts["margins_EB"] = counts.view(num_experts, BINS)


def even_bias(counts: GlobalCounts, k: int) -> Tensor:
    """Return the bias with which each expert alone would get its even share, fp64 ``[E]``.

    Quantile balancing (Megatron's ``qb_dual_update``): ``-bias`` is the margin that ``T k / E``
    tokens of the global batch exceed, from the histogram, with a straight line within a bin.
    """
    counts_EB = counts.extra["margins_EB"].double().flip(1)  # largest margins first
    share = counts.num_tokens.double() * k / len(counts_EB)
    above_EB = counts_EB.cumsum(dim=1)
    bin_E1 = (above_EB <= share).sum(dim=1, keepdim=True).clamp(max=BINS - 1)
    inside_E1 = counts_EB.gather(1, bin_E1)
    missing_E1 = share - (above_EB.gather(1, bin_E1) - inside_E1)
    place_E = (bin_E1 + missing_E1 / inside_E1.clamp(min=1)).squeeze(1)
    root_E = 1 - place_E * (2 / BINS)
    return -root_E.pow(3)


def problem_with_quantiles(
    rate: float | None, k: int, num_groups: int, num_experts: int
) -> str | None:
    """Return in one sentence why a router cannot balance by quantiles, or None."""
    if rate is None or rate > 1:
        return (
            f"router.bias_update is quantile, but router.bias_update_rate is {rate}; use a value "
            "from 0 to 1, the part of its way that the bias moves."
        )
    if num_groups > 1:
        return (
            f"router.bias_update is quantile, but router.num_groups is {num_groups}; use "
            "num_groups: 1, or bias_update: sign."
        )
    if k == num_experts:
        return (
            f"router.bias_update is quantile, but router.k is {k}, all experts of the layer; lower "
            "k, or use bias_update: sign."
        )
    return None
