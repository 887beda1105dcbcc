"""The expert MLP on ``F.grouped_mm``, for GPUs: all groups at once, no host synchronisation.

Every routed row names an expert that is here, or none (-1), as dispatchers see to.

T tokens, K choices, R = T*K routed rows in expert order (those without an expert here come last,
and their lines are undefined), D model width, F expert width, H = 2F, S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import gated, gated_backward
from .expert_weights import ExpertWeights, MainGrads
from .grouping import Grouping


def can_run(x_TD: Tensor, experts: ExpertWeights) -> bool:
    """Say whether ``F.grouped_mm`` serves these weights: bf16 on a GPU, consecutive experts."""
    fc1, fc2 = experts.fc1_SHD, experts.fc2_SDF
    return (
        x_TD.is_cuda
        and fc1.dtype == torch.bfloat16
        and experts.consecutive is not None
        and fc1.is_contiguous()
        and fc2.is_contiguous()
        and all(side * fc1.element_size() % 16 == 0 for side in (*fc1.shape[1:], fc2.shape[2]))
    )


def forward(x_TD: Tensor, grouping: Grouping, experts: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Return pre-activations ``h_RH``, which backward needs, and outputs ``y_RD``."""
    h_RH = pre_activations(x_TD, grouping, experts)
    fc2_SFD = experts.fc2_SDF.transpose(1, 2)
    ends_S = _slot_ends(grouping, experts)
    return h_RH, F.grouped_mm(gated(h_RH, experts.activation), fc2_SFD, offs=ends_S)


def pre_activations(x_TD: Tensor, grouping: Grouping, experts: ExpertWeights) -> Tensor:
    """Return ``h_RH``."""
    fc1_SDH, ends_S = experts.fc1_SHD.transpose(1, 2), _slot_ends(grouping, experts)
    return F.grouped_mm(x_TD[grouping.tokens_R], fc1_SDH, offs=ends_S)


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    h_RH: Tensor,
    grouping: Grouping,
    experts: ExpertWeights,
    sums: MainGrads,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of each row's x, ``[R, D]``, and of ``weights_TK``.

    Those of fc1 and fc2 are left in ``sums``.
    """
    ends_S = _slot_ends(grouping, experts)
    tokens_R = grouping.tokens_R
    grad_RD = grad_TD[tokens_R]
    weights_R1 = weights_TK.reshape(-1)[grouping.order_R].unsqueeze(-1)
    unscaled_RF = F.grouped_mm(grad_RD, experts.fc2_SDF, offs=ends_S)
    grad_act_RF = (unscaled_RF * weights_R1).to(unscaled_RF.dtype)
    act_RF, grad_h_RH = gated_backward(h_RH, grad_act_RF, experts.activation)
    # <dy_t, y_row> = <dy_t W2, act>, so the outputs need not be kept.
    grad_weights_R = (unscaled_RF * act_RF).sum(dim=-1, dtype=weights_TK.dtype)
    present_R = grouping.inverse_R < grouping.offsets_E1[-1]
    grad_weights_R = torch.where(present_R, grad_weights_R[grouping.inverse_R], 0)
    scaled_act_RF = (act_RF * weights_R1).to(act_RF.dtype)
    sums.begin_with_zeros()
    sums.fc2_SDF += F.grouped_mm(grad_RD.t(), scaled_act_RF, offs=ends_S)
    sums.fc1_SHD += F.grouped_mm(grad_h_RH.t(), x_TD[tokens_R], offs=ends_S)
    grad_x_RD = F.grouped_mm(grad_h_RH, experts.fc1_SHD, offs=ends_S)
    return grad_x_RD, grad_weights_R.view_as(weights_TK)


def _slot_ends(grouping: Grouping, experts: ExpertWeights) -> Tensor:
    """Return int32 ``[S]``: where each slot's rows end."""
    here = experts.consecutive
    assert here is not None, "can_run was not asked"
    return grouping.offsets_E1[here.start + 1 : here.stop + 1]
