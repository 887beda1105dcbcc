"""The choice of experts on torch's operators.

T tokens, E experts, K choices, G groups of experts, e experts of a group.
"""

import torch
from torch import Tensor

from ..values.choice import (
    EPSILON,
    ChoiceRule,
    Choices,
    check_ids,
    count_choices,
    loss_sums,
    scores,
    where_valid,
)


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
    experts_TK = where_valid(valid_T, chosen_TK.int())
    counts_E = count_choices(experts_TK, logits_TE.shape[1])
    sums = loss_sums(logits_TE, scores_TE, valid_T, rule) if wants_sums else None
    return Choices(experts_TK, _normalized(weights_TK, rule), counts_E, sums)


def weigh_torch(
    logits_TE: Tensor,
    experts_TK: Tensor,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    wants_sums: bool,
) -> Choices:
    """Weigh experts that are given, as :func:`choose_torch` weighs those that it chooses.

    Groups are not looked at. A choice of -1 has weight 0 and is not counted. For the experts of
    ``choose_torch``, values and gradients have the same bits. Raises ``ValueError`` for ids that
    do not exist.
    """
    num_experts = logits_TE.shape[1]
    given_TK = check_ids(experts_TK, num_experts).long()
    scores_TE = scores(logits_TE, rule)
    weights_TK = scores_TE.gather(-1, given_TK.clamp(min=0))
    weights_TK = torch.where(given_TK >= 0, weights_TK, 0)
    experts_TK = where_valid(valid_T, given_TK.int())
    counts_E = count_choices(experts_TK, num_experts)
    sums = loss_sums(logits_TE, scores_TE, valid_T, rule) if wants_sums else None
    return Choices(experts_TK, _normalized(weights_TK, rule), counts_E, sums)


def _normalized(weights_TK: Tensor, rule: ChoiceRule) -> Tensor:
    if rule.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + EPSILON)
    return weights_TK if rule.scale == 1 else weights_TK * rule.scale


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
