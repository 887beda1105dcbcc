"""A router's choice: the rule, its result, and the parts that every backend shares.

T tokens, E experts, K choices.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .grouping import outside

EPSILON = 1e-20
"""Keeps weights finite if all chosen sigmoid scores are zero (DeepSeek-V3)."""


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
    """A group of experts is ranked by the sum of this many of its best scores (DeepSeek-V3: 2)."""


class LossSums(NamedTuple):
    """Sums over the valid rows, with gradient."""

    probability_sums_E: Tensor
    """Scores that are normalized to 1 over the experts, summed over rows."""
    z_sum: Tensor
    """logsumexp(logits)^2, summed over rows."""


class Choices(NamedTuple):
    """The result of a rule."""

    experts_TK: Tensor
    """int32 expert ids, best first; -1 in rows that are not valid."""
    weights_TK: Tensor
    """Their weights, with gradient; rows that are not valid have weights, too."""
    counts_E: Tensor
    """int64: how many valid rows choose each expert."""
    sums: LossSums | None
    """None if the caller did not ask for them."""


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


def check_ids(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Return ``experts_TK``; raise ``ValueError`` for ids outside -1 (none) to E - 1.

    On a GPU they are not looked at, because that waits for the device.
    """
    if experts_TK.device.type == "cpu" and experts_TK.numel():
        lowest, highest = (int(bound) for bound in experts_TK.aminmax())
        if lowest < -1 or highest >= num_experts:
            raise ValueError(outside(lowest if lowest < -1 else highest, num_experts))
    return experts_TK


def count_choices(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Return int64 ``[E]``: how often each expert is chosen; -1 is not counted."""
    ids_R = experts_TK.reshape(-1).long()
    if not ids_R.is_cuda:  # on a GPU bincount waits for the device to learn its size
        return torch.bincount(ids_R + 1, minlength=num_experts + 1)[1:]
    present_R = (ids_R >= 0).long()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_R.device)
    return counts_E.scatter_add_(0, ids_R.clamp(min=0), present_R)


def loss_sums(
    logits_TE: Tensor, scores_TE: Tensor, valid_T: Tensor | None, rule: ChoiceRule
) -> LossSums:
    """Return what losses need of the valid rows."""
    z_T = logits_TE.logsumexp(dim=-1).square()
    if valid_T is not None:
        z_T = torch.where(valid_T, z_T, 0)
    return LossSums(probabilities(scores_TE, valid_T, rule).sum(dim=0), z_T.sum())
