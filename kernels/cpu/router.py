"""The top-k router without gradients on the C++ kernels. T tokens, D model width, E experts."""

import ctypes
from typing import Literal

import torch
from torch import Tensor

from .library import TYPES, empty_fp32, functions_for
from .structures import RouterArguments

SCORES = ("softmax", "sigmoid")


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    k: int,
    *,
    logit_bias_E: Tensor | None = None,
    score: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    num_groups: int = 1,
    top_groups: int = 1,
    group_best: int = 2,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return experts ``[T, K]`` int32, weights ``[T, K]`` fp32 and counts ``[E]`` int64.

    ``bias_E`` is added to the scores to choose by, ``logit_bias_E`` to the logits; a group of
    experts is judged by the sum of its ``group_best`` best. The other options mean what they do in
    :class:`moeyard.TopK`; equal scores go to the lower id. None where the kernels cannot run.
    """
    functions = functions_for(x_TD)
    biases = (logit_bias_E, bias_E)
    wide = [weight_ED, *(bias for bias in biases if bias is not None)]
    if functions is None or functions_for(*wide) is None or weight_ED.dtype != torch.float32:
        return None
    num_tokens, num_experts = x_TD.shape[0], weight_ED.shape[0]
    experts_TK = torch.empty(num_tokens, k, dtype=torch.int32, device="cpu")
    weights_TK = empty_fp32(num_tokens, k)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
    arguments = RouterArguments(
        *(TYPES[x_TD.dtype], *x_TD.shape, num_experts, k, SCORES.index(score), renormalize),
        *(num_groups, top_groups, group_best, torch.get_num_threads(), scale, epsilon),
        *(x_TD.data_ptr(), weight_ED.data_ptr()),
        *(None if bias is None else bias.data_ptr() for bias in biases),
        *(experts_TK.data_ptr(), weights_TK.data_ptr(), counts_E.data_ptr()),
    )
    functions.moeyard_route(ctypes.byref(arguments))
    return experts_TK, weights_TK, counts_E
