"""The choice of experts on torch's operators, and the values that every router backend shares.

T tokens, E experts, K choices, G groups of experts, e experts of a group.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-20
"""Keeps weights finite where all chosen sigmoid scores vanish (DeepSeek-V3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRule:
    """How logits become choices and weights; ``moeyard.TopK`` says what each field means."""

    k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    """A group of experts is judged by the sum of this many of its best scores (DeepSeek-V3: 2)."""


class LossSums(NamedTuple):
    """Sums over the valid rows, with gradient."""

    probability_sums_E: Tensor
    """Scores that add up to 1 over the experts, summed."""
    z_sum: Tensor
    """logsumexp(logits)^2, summed."""


class Choices(NamedTuple):
    """What a rule makes of logits."""

    experts_TK: Tensor
    """int32 expert ids, best first; -1 in rows that are not valid."""
    weights_TK: Tensor
    """Their weights, with gradient; rows that are not valid have some, too."""
    counts_E: Tensor
    """int64: how many valid rows choose each expert."""
    sums: LossSums | None
    """None where nobody asked."""


def choose_torch(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    wants_sums: bool,
) -> Choices:
    """Choose by torch's operators, in any floating type and on any device."""
    scores_TE = scores(logits_TE, rule)
    if bias_E is None and rule.num_groups == 1:
        weights_TK, chosen_TK = scores_TE.topk(rule.k, dim=-1)
    else:
        selection_TE = _selection(scores_TE.detach(), bias_E, rule)
        chosen_TK = selection_TE.topk(rule.k, dim=-1).indices
        weights_TK = scores_TE.gather(-1, chosen_TK)
    if rule.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + EPSILON)
    if rule.scale != 1:
        weights_TK = weights_TK * rule.scale
    experts_TK = where_valid(valid_T, chosen_TK.int())
    counts_E = count_choices(experts_TK, logits_TE.shape[1])
    sums = _loss_sums(logits_TE, scores_TE, valid_T, rule) if wants_sums else None
    return Choices(experts_TK, weights_TK, counts_E, sums)


def where_valid(valid_T: Tensor | None, experts_TK: Tensor) -> Tensor:
    """Return the experts of valid rows, and -1 in the others."""
    return experts_TK if valid_T is None else torch.where(valid_T.unsqueeze(-1), experts_TK, -1)


def scores(logits_TE: Tensor, rule: ChoiceRule) -> Tensor:
    """Return each expert's score, from 0 to 1."""
    return logits_TE.sigmoid() if rule.score == "sigmoid" else logits_TE.softmax(dim=-1)


def probabilities(scores_TE: Tensor, valid_T: Tensor | None, rule: ChoiceRule) -> Tensor:
    """Return scores that add up to 1 over the experts; those of rows that are not valid are 0."""
    if rule.score == "sigmoid":
        scores_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + EPSILON)
    if valid_T is not None:
        scores_TE = torch.where(valid_T.unsqueeze(-1), scores_TE, 0)
    return scores_TE


def count_choices(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Return int64 ``[E]``: how often each expert is chosen; -1 is not counted."""
    ids_R = experts_TK.reshape(-1).long()
    if not ids_R.is_cuda:  # there bincount would wait for the device to learn its size
        return torch.bincount(ids_R + 1, minlength=num_experts + 1)[1:]
    present_R = (ids_R >= 0).long()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_R.device)
    return counts_E.scatter_add_(0, ids_R.clamp(min=0), present_R)


def _loss_sums(
    logits_TE: Tensor, scores_TE: Tensor, valid_T: Tensor | None, rule: ChoiceRule
) -> LossSums:
    z_T = logits_TE.logsumexp(dim=-1).square()
    if valid_T is not None:
        z_T = torch.where(valid_T, z_T, 0)
    return LossSums(probabilities(scores_TE, valid_T, rule).sum(dim=0), z_T.sum())


def _selection(scores_TE: Tensor, bias_E: Tensor | None, rule: ChoiceRule) -> Tensor:
    """Return the scores to choose by: with the bias, -inf outside the best groups."""
    if bias_E is not None:
        scores_TE = scores_TE + bias_E
    if rule.num_groups == 1:
        return scores_TE
    scores_TGe = scores_TE.unflatten(-1, (rule.num_groups, -1))
    best = min(rule.group_best, scores_TGe.shape[-1])
    group_scores_TG = scores_TGe.topk(best, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    kept_TG.scatter_(-1, group_scores_TG.topk(rule.top_groups, dim=-1).indices, True)
    return scores_TGe.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(-2)
