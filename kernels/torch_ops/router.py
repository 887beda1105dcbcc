"""The choice of experts on torch's operators.

T tokens, E experts, K choices, G groups of experts, e experts of a group.
"""

import torch
from torch import Tensor

from ..values.choice import (
    EPSILON,
    ChoiceRule,
    Choices,
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
    if rule.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + EPSILON)
    if rule.scale != 1:
        weights_TK = weights_TK * rule.scale
    experts_TK = where_valid(valid_T, chosen_TK.int())
    counts_E = count_choices(experts_TK, logits_TE.shape[1])
    sums = loss_sums(logits_TE, scores_TE, valid_T, rule) if wants_sums else None
    return Choices(experts_TK, weights_TK, counts_E, sums)


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
