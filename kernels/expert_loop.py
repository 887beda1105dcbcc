"""The expert MLP expert by expert, for CPUs: a group stays in the cache from gather to product.

``F.grouped_mm`` gains nothing on a CPU: over a loop of ``torch.mm`` on 32 groups of [512, 512], 2
threads, it takes 0.84 of the time in bf16 and 0.97 in fp32 at 2 rows a group, and 0.98 and 0.99 at
256 (benchmarks/constants.py), and between its products everything goes through memory.

T tokens, K choices, R = T*K routed rows, N <= R rows whose expert is here, in expert order,
D model width, F expert width, H = 2F, S slots, n rows of one group.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import gated, gated_backward
from .expert_weights import ExpertWeights, MainGrads
from .grouping import Grouping
from .row_stable import bf16_row_stable_linear


class Span(NamedTuple):
    """Where a group's rows stand in expert order, and the slot of its expert."""

    slot: int
    start: int
    end: int


def spans_of(
    grouping: Grouping, experts: ExpertWeights, only: Iterable[int] | None = None
) -> list[Span]:
    """Return the groups that have rows, as numbers on the host; ``only`` names some experts."""
    bounds = grouping.offsets_E1.tolist()
    spans = []
    for expert in range(len(bounds) - 1) if only is None else only:
        if bounds[expert] < bounds[expert + 1]:
            slot = experts.slot(expert)
            assert slot >= 0, f"expert {expert} has rows but no slot"
            spans.append(Span(slot, bounds[expert], bounds[expert + 1]))
    return spans


def infer(
    x_TD: Tensor, grouping: Grouping, experts: ExpertWeights, spans: list[Span], out_RD: Tensor
) -> None:
    """Write the outputs of the groups into their lines of ``out_RD``, keeping nothing.

    In bf16 a row's bits do not depend on how many rows its group has.
    """
    tokens_R = grouping.tokens_R
    for slot, start, end in spans:
        x_nD = x_TD.index_select(0, tokens_R[start:end])
        h_nH = bf16_row_stable_linear(x_nD, experts.fc1_SHD[slot])
        act_nF = gated(h_nH, experts.activation)
        out_RD[start:end] = bf16_row_stable_linear(act_nF, experts.fc2_SDF[slot])


def forward(
    x_TD: Tensor, grouping: Grouping, experts: ExpertWeights, spans: list[Span]
) -> tuple[Tensor, Tensor]:
    """Return pre-activations ``h_NH``, which backward needs, and outputs ``y_ND``."""
    num_rows = spans[-1].end if spans else 0
    h_NH = x_TD.new_empty(num_rows, experts.fc1_SHD.shape[1])
    y_ND = x_TD.new_empty(num_rows, x_TD.shape[1])
    tokens_R = grouping.tokens_R
    for slot, start, end in spans:
        h_nH = h_NH[start:end]
        torch.mm(x_TD.index_select(0, tokens_R[start:end]), experts.fc1_SHD[slot].t(), out=h_nH)
        torch.mm(gated(h_nH, experts.activation), experts.fc2_SDF[slot].t(), out=y_ND[start:end])
    return h_NH, y_ND


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    h_NH: Tensor,
    grouping: Grouping,
    experts: ExpertWeights,
    spans: list[Span],
    sums: MainGrads,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of each row's x, ``[N, D]``, and of ``weights_TK``.

    Those of fc1 and fc2 are left in ``sums``.
    """
    grad_x_ND = x_TD.new_empty(h_NH.shape[0], x_TD.shape[1])
    grad_weights_R = torch.zeros_like(weights_TK).reshape(-1)
    tokens_R, order_R = grouping.tokens_R, grouping.order_R
    weights_R1 = weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(-1)
    for slot, start, end in spans:
        tokens_n, weight_n1 = tokens_R[start:end], weights_R1[start:end]
        grad_nD = grad_TD.index_select(0, tokens_n)
        unscaled_nF = torch.mm(grad_nD, experts.fc2_SDF[slot])
        grad_act_nF = (unscaled_nF * weight_n1).to(unscaled_nF.dtype)
        act_nF, grad_h_nH = gated_backward(h_NH[start:end], grad_act_nF, experts.activation)
        # <dy_t, y_row> = <dy_t W2, act>, so the outputs need not be kept.
        grad_weights_R[start:end] = (unscaled_nF * act_nF).sum(dim=-1, dtype=weights_TK.dtype)
        scaled_act_nF = (act_nF * weight_n1).to(act_nF.dtype)
        _add_product(sums.fc2_SDF[slot], grad_nD, scaled_act_nF, sums.is_empty)
        x_nD = x_TD.index_select(0, tokens_n)
        _add_product(sums.fc1_SHD[slot], grad_h_nH, x_nD, sums.is_empty)
        torch.mm(grad_h_nH, experts.fc1_SHD[slot], out=grad_x_ND[start:end])
    if sums.is_empty:
        _zero_others(sums, spans)
    return grad_x_ND, grad_weights_R.index_select(0, grouping.inverse_R).view_as(weights_TK)


def _add_product(total_QP: Tensor, grad_nQ: Tensor, x_nP: Tensor, is_empty: bool) -> None:
    """Add ``grad.T @ x`` to a sum that may be wider, or write it if there is no sum yet."""
    if total_QP.dtype != grad_nQ.dtype:
        product_QP = torch.mm(grad_nQ.t(), x_nP)
        _ = total_QP.copy_(product_QP) if is_empty else total_QP.add_(product_QP)
    elif is_empty:
        torch.mm(grad_nQ.t(), x_nP, out=total_QP)
    else:
        total_QP.addmm_(grad_nQ.t(), x_nP)


def _zero_others(sums: MainGrads, spans: list[Span]) -> None:
    """Fill the sums of experts without rows; the others have just been written."""
    for slot in set(range(sums.fc1_SHD.shape[0])) - {span.slot for span in spans}:
        sums.fc1_SHD[slot].zero_()
        sums.fc2_SDF[slot].zero_()
