"""The expert MLP on grouped products, for GPUs: one product for all groups.

The products are ``F.grouped_mm``'s, without host synchronisation, or another library's. Every
routed row must name an expert that is here, or none (-1); expert paths guarantee that.

T tokens, K choices, R = T*K routed rows in expert order (those without an expert here come last,
and their lines are undefined), D model width, F expert width, H rows of fc1, S slots; P and Q stand
for the inputs and outputs of a product.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values.activation import gated, gated_backward
from ..values.expert_weights import ExpertWeights
from ..values.grouping import Grouping
from ..values.main_grads import MainGrads


class GroupedProducts(Protocol):
    """Products of rows in expert order with the matrices of their experts."""

    def rows(self, x_RP: Tensor, weight_SPQ: Tensor) -> Tensor:
        """Return ``x_r @ weight_slot(r)``, ``[R, Q]``; either of the weight's last two dimensions
        is contiguous."""
        ...

    def sums(self, left_RQ: Tensor, right_RP: Tensor) -> Tensor:
        """Return each slot's ``left_rows^T @ right_rows``, ``[S, Q, P]``; 0 without rows."""
        ...


ALIGNED_COLUMNS = 8
"""16 bytes of bf16; grouped products need rows of a multiple of this."""

MakeProducts = Callable[[Grouping, ExpertWeights], GroupedProducts]


class TorchProducts:
    """Grouped products by ``F.grouped_mm``."""

    def __init__(self, grouping: Grouping, experts: ExpertWeights) -> None:
        self._ends_S = _slot_ends(grouping, experts)

    def rows(self, x_RP: Tensor, weight_SPQ: Tensor) -> Tensor:
        """Return ``x_r @ weight_slot(r)``."""
        return F.grouped_mm(x_RP, weight_SPQ, offs=self._ends_S)

    def sums(self, left_RQ: Tensor, right_RP: Tensor) -> Tensor:
        """Return each slot's ``left_rows^T @ right_rows``."""
        return F.grouped_mm(left_RQ.t(), right_RP, offs=self._ends_S)


def can_run(x_TD: Tensor, experts: ExpertWeights) -> bool:
    """Say whether ``F.grouped_mm`` supports these weights: bf16 on a GPU, consecutive experts."""
    fc1, fc2 = experts.fc1_SHD, experts.fc2_SDF
    return (
        x_TD.is_cuda
        and fc1.dtype == torch.bfloat16
        and experts.consecutive is not None
        and fc1.is_contiguous()
        and fc2.is_contiguous()
        and all(side * fc1.element_size() % 16 == 0 for side in (*fc1.shape[1:], fc2.shape[2]))
    )


def forward(
    x_TD: Tensor, grouping: Grouping, experts: ExpertWeights, products: GroupedProducts
) -> tuple[Tensor, Tensor]:
    """Return pre-activations ``h_RH``, which backward needs, and outputs ``y_RD``."""
    h_RH = pre_activations(x_TD, grouping, experts, products)
    act_RF = gated(h_RH, experts.activation)
    y_RD = products.rows(act_RF, experts.fc2_SDF.transpose(1, 2))
    if experts.fc2_bias_SD is not None:
        y_RD += experts.fc2_bias_SD[_slots_R(grouping, experts)]
    return h_RH, y_RD


def pre_activations(
    x_TD: Tensor, grouping: Grouping, experts: ExpertWeights, products: GroupedProducts
) -> Tensor:
    """Return pre-activations ``h_RH``."""
    h_RH = products.rows(x_TD[grouping.tokens_R], experts.fc1_SHD.transpose(1, 2))
    if experts.fc1_bias_SH is not None:
        h_RH += experts.fc1_bias_SH[_slots_R(grouping, experts)]
    return h_RH


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    h_RH: Tensor,
    grouping: Grouping,
    experts: ExpertWeights,
    products: GroupedProducts,
    sums: MainGrads,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of each row's x, ``[R, D]``, and of ``weights_TK``.

    Parameter gradients are left in ``sums``.
    """
    tokens_R = grouping.tokens_R
    grad_RD = grad_TD[tokens_R]
    weights_R1 = weights_TK.reshape(-1)[grouping.order_R].unsqueeze(-1)
    unscaled_RF = products.rows(grad_RD, experts.fc2_SDF)
    grad_act_RF = (unscaled_RF * weights_R1).to(unscaled_RF.dtype)
    act_RF, grad_h_RH = gated_backward(h_RH, grad_act_RF, experts.activation)
    # <dy_t, y_row> = <dy_t W2, act> + <dy_t, b2>, so the outputs need not be kept.
    grad_weights_R = (unscaled_RF * act_RF).sum(dim=-1, dtype=weights_TK.dtype)
    if experts.fc2_bias_SD is not None:
        bias2_RD = experts.fc2_bias_SD[_slots_R(grouping, experts)]
        grad_weights_R += (grad_RD * bias2_RD).sum(dim=-1, dtype=weights_TK.dtype)
    present_R = grouping.inverse_R < grouping.offsets_E1[-1]
    grad_weights_R = torch.where(present_R, grad_weights_R[grouping.inverse_R], 0)
    sums.begin_with_zeros()
    if sums.fc2_SDF is not None:
        sums.fc2_SDF += products.sums(grad_RD, (act_RF * weights_R1).to(act_RF.dtype))
    if sums.fc1_SHD is not None:
        sums.fc1_SHD += products.sums(grad_h_RH, x_TD[tokens_R])
    if sums.fc1_bias_SH is not None:
        sums.fc1_bias_SH += _row_sums(grad_h_RH, torch.ones_like(weights_R1), products)
    if sums.fc2_bias_SD is not None:
        sums.fc2_bias_SD += _row_sums(grad_RD, weights_R1, products)
    return products.rows(grad_h_RH, experts.fc1_SHD), grad_weights_R.view_as(weights_TK)


def _row_sums(rows_RQ: Tensor, weights_R1: Tensor, products: GroupedProducts) -> Tensor:
    """Return each slot's weighted sum of rows, ``[S, Q]``, as a product.

    An indexed sum would use atomics on a GPU and read undefined lines.
    """
    column_R8 = weights_R1.to(rows_RQ.dtype).expand(-1, ALIGNED_COLUMNS).contiguous()
    return products.sums(rows_RQ, column_R8)[..., 0]


def _slots_R(grouping: Grouping, experts: ExpertWeights) -> Tensor:
    """Return int64 ``[R]``: the slot of each row; any slot for rows without an expert here."""
    ends_S = _slot_ends(grouping, experts)
    places_R = torch.arange(grouping.order_R.numel(), device=ends_S.device, dtype=ends_S.dtype)
    return torch.searchsorted(ends_S, places_R, right=True).clamp(max=len(ends_S) - 1)


def _slot_ends(grouping: Grouping, experts: ExpertWeights) -> Tensor:
    """Return int32 ``[S]``: where each slot's rows end."""
    here = experts.consecutive
    assert here is not None, "can_run was not asked"
    return grouping.offsets_E1[here.start + 1 : here.stop + 1]
