"""The choice of experts on Triton's kernels: what they support, and a call. T tokens, E experts."""

import torch
from torch import Tensor

from ..values.choice import ChoiceRule, Choices, LossSums, where_valid
from .device import why_not

MAX_EXPERTS = 1024
"""The most experts of a router. Padding between groups may double the lanes of a tile; more lanes
would spill."""


def misfit(logits_TE: Tensor) -> str | None:
    """Return one sentence on why the router's kernels do not support these logits, or None."""
    if logits_TE.dtype != torch.float32:
        return f"Triton's router takes fp32 logits, not {logits_TE.dtype}."
    if logits_TE.shape[1] > MAX_EXPERTS:
        return f"Triton's router takes at most {MAX_EXPERTS} experts, not {logits_TE.shape[1]}."
    return None


def choose_triton(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    wants_sums: bool,
) -> Choices:
    """Choose in one pass over the logits; ties go to the lower id.

    Raises ``ValueError`` if the kernels cannot run or do not support the logits.
    """
    problem = why_not(logits_TE.device) or misfit(logits_TE)
    if problem is not None:
        raise ValueError(f"{problem} Use backend 'torch'.")
    from .router_ops import route_op

    chosen_TK, weights_TK, counts_E, sums_E, z_sum = route_op(
        logits_TE.contiguous(),
        None if bias_E is None else bias_E.float().contiguous(),
        None if valid_T is None else valid_T.contiguous(),
        rule.k,
        rule.score == "sigmoid",
        rule.renormalize,
        rule.scale,
        rule.num_groups,
        rule.top_groups,
        rule.group_best,
        wants_sums,
    )
    sums = LossSums(sums_E, z_sum) if wants_sums else None
    return Choices(where_valid(valid_T, chosen_TK), weights_TK, counts_E, sums)
