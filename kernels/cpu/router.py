"""The top-k router without gradients on the C++ kernels. T tokens, D model width, E experts."""

import ctypes

import torch
from torch import Tensor

from ..values.choice import EPSILON, ChoiceRule, Choices, check_ids
from .library import TYPES, address, empty_fp32, functions_for
from .structures import RouterArguments

SCORES = ("softmax", "sigmoid")


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    logit_bias_E: Tensor | None,
    bias_E: Tensor | None,
    rule: ChoiceRule,
    given_TK: Tensor | None = None,
) -> Choices | None:
    """Choose by ``scores(x @ weight.T + logit_bias) + bias``, all rows valid, without loss sums.

    Scores are computed in fp32; ties go to the lower id. ``given_TK`` (int, -1 = none) are experts
    to weigh instead of choosing; an id that does not exist raises ``ValueError``. None if the
    kernels cannot run.
    """
    functions = functions_for(x_TD)
    wide = [part for part in (weight_ED, logit_bias_E, bias_E) if part is not None]
    if functions is None or functions_for(*wide) is None or weight_ED.dtype != torch.float32:
        return None
    num_tokens, num_experts = x_TD.shape[0], weight_ED.shape[0]
    if given_TK is not None:
        given_TK = check_ids(given_TK, num_experts).to(torch.int32).contiguous()
    choices = rule.k if given_TK is None else given_TK.shape[1]
    experts_TK = torch.empty(num_tokens, choices, dtype=torch.int32, device="cpu")
    weights_TK = empty_fp32(num_tokens, choices)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
    arguments = RouterArguments(
        type=TYPES[x_TD.dtype],
        tokens=num_tokens,
        d_model=x_TD.shape[1],
        num_experts=num_experts,
        choices=choices,
        score=SCORES.index(rule.score),
        renormalize=rule.renormalize,
        num_groups=rule.num_groups,
        top_groups=rule.top_groups,
        group_best=rule.group_best,
        threads=torch.get_num_threads(),
        scale=rule.scale,
        epsilon=EPSILON,
        x=x_TD.data_ptr(),
        weight=weight_ED.data_ptr(),
        logit_bias=address(logit_bias_E),
        bias=address(bias_E),
        given=address(given_TK),
        experts=experts_TK.data_ptr(),
        weights=weights_TK.data_ptr(),
        counts=counts_E.data_ptr(),
    )
    functions.moeyard_route(ctypes.byref(arguments))
    return Choices(experts_TK, weights_TK, counts_E, sums=None)
