"""The expert MLP on plain torch matrix products, with its backward written out.

T tokens, K choices, R = T*K routed rows in expert order, E experts, D model width, F expert width,
H = 2F. Only x, the pre-activations, the routing weights and the grouping are saved for backward
(the identities are SonicMoE's: reading the routing gradient off the recomputed activation saves
keeping the expert outputs).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .activation import gated, gated_backward
from .expert_weights import ExpertWeights
from .grouped_matmul import GroupedMatmul
from .grouping import Grouping, group_tokens
from .row_stable import bf16_row_stable_linear


def expert_rows(
    x_TD: Tensor,
    grouping: Grouping,
    experts: ExpertWeights,
    *,
    only: Iterable[int] | None = None,
    out_RD: Tensor | None = None,
) -> Tensor:
    """Run the experts without gradients and return their outputs, ``[R, D]`` in expert order.

    ``only`` names the experts to run and ``out_RD`` receives their rows, so that experts can come
    in waves; every row's bits are the same whichever waves it is split into.
    """
    matmul = GroupedMatmul(grouping, experts, only)
    if matmul.is_fused and x_TD.is_cuda:
        hidden_RF = gated(
            matmul.linear(x_TD[grouping.tokens_R], experts.fc1_SHD), experts.activation
        )
        return matmul.linear(hidden_RF, experts.fc2_SDF)
    if out_RD is None:
        out_RD = x_TD.new_empty(grouping.order_R.numel(), x_TD.shape[1])
    tokens_R = grouping.tokens_R
    for slot, start, end in matmul.spans:
        x_ND = x_TD[tokens_R[start:end]]
        h_NH = bf16_row_stable_linear(x_ND, experts.fc1_SHD[slot])
        hidden_NF = gated(h_NH, experts.activation)
        out_RD[start:end] = bf16_row_stable_linear(hidden_NF, experts.fc2_SDF[slot])
    return out_RD


def combine_rows(y_RD: Tensor, grouping: Grouping, weights_TK: Tensor) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * y_row(t, k)`` in k order, summed in weights' type.

    Routed rows without an expert contribute nothing, whatever their (undefined) line holds.
    """
    num_tokens, num_choices = weights_TK.shape
    present_R = grouping.inverse_R < grouping.offsets_E1[-1]
    weights_R = torch.where(present_R, weights_TK.reshape(-1), 0)
    rows_RD = y_RD[grouping.inverse_R]
    rows_RD = torch.where(present_R.unsqueeze(-1), rows_RD, 0)
    rows_TKD = rows_RD.view(num_tokens, num_choices, y_RD.shape[1])
    return (rows_TKD * weights_R.view(num_tokens, num_choices, 1)).sum(dim=1).to(y_RD.dtype)


class ExpertMLP(torch.autograd.Function):
    """``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, forward and backward."""

    @staticmethod
    def forward(ctx, x_TD, experts_TK, weights_TK, fc1_SHD, fc2_SDF, slot_of_E, activation):  # type: ignore[no-untyped-def]
        experts = ExpertWeights(fc1_SHD, fc2_SDF, slot_of_E, activation)
        grouping = group_tokens(experts_TK, experts.num_experts)
        matmul = GroupedMatmul(grouping, experts)
        h_RH = matmul.linear(x_TD[grouping.tokens_R], fc1_SHD)
        y_RD = matmul.linear(gated(h_RH, activation), fc2_SDF)
        ctx.save_for_backward(x_TD, weights_TK, h_RH, fc1_SHD, fc2_SDF)
        ctx.grouping, ctx.matmul, ctx.activation = grouping, matmul, activation
        return combine_rows(y_RD, grouping, weights_TK)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, weights_TK, h_RH, fc1_SHD, fc2_SDF = ctx.saved_tensors
        grouping, matmul = ctx.grouping, ctx.matmul
        present_R = grouping.inverse_R < grouping.offsets_E1[-1]
        tokens_R = grouping.tokens_R
        grad_RD = grad_TD[tokens_R]
        scale_R1 = weights_TK.reshape(-1)[grouping.order_R].unsqueeze(-1)

        act_RF = gated(h_RH, ctx.activation)
        unscaled_RF = matmul.linear_grad_input(grad_RD, fc2_SDF)
        # <dy_t, y_row> = <dy_t W2, act>, so the outputs need not be kept.
        grad_scale_R = (unscaled_RF * act_RF).sum(dim=-1, dtype=weights_TK.dtype)
        grad_scale_R = torch.where(present_R, grad_scale_R[grouping.inverse_R], 0)

        scaled_act_RF = (act_RF * scale_R1).to(act_RF.dtype)
        grad_fc2_SDF = matmul.linear_grad_weight(grad_RD, scaled_act_RF, fc2_SDF)
        grad_act_RF = (unscaled_RF * scale_R1).to(unscaled_RF.dtype)
        grad_h_RH = gated_backward(h_RH, grad_act_RF, ctx.activation)
        grad_fc1_SHD = matmul.linear_grad_weight(grad_h_RH, x_TD[tokens_R], fc1_SHD)

        grad_x_RD = matmul.linear_grad_input(grad_h_RH, fc1_SHD)[grouping.inverse_R]
        grad_x_RD = torch.where(present_R.unsqueeze(-1), grad_x_RD, 0)
        grad_x_TD = grad_x_RD.view(*weights_TK.shape, x_TD.shape[1]).sum(dim=1)
        grad_weights_TK = grad_scale_R.view_as(weights_TK)
        return grad_x_TD, None, grad_weights_TK, grad_fc1_SHD, grad_fc2_SDF, None, None
