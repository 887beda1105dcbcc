"""The expert MLP expert by expert, for CPUs: a group stays in the cache from gather to product.

``F.grouped_mm`` gains little on a CPU, and between its products everything goes through memory. On
32 groups of [512, 512] and 2 threads it takes 0.84 of the time of a ``torch.mm`` loop in bf16 and
0.97 in fp32 at 2 rows a group, and 0.98 and 0.99 at 256 (benchmarks/constants.py).

In bf16 oneDNN compiles code for every new number of rows and keeps 1024 pieces. Compiling
takes about as long as a product of 128 rows, and routing gives new numbers in every step. Training
therefore pads each group to one of few sizes. The padding rows are the next group's: they get
weight 0 here and are computed again in their own group.

T tokens, K choices, R = T*K routed rows, N <= R rows whose expert is here, in expert order, M >= N
with the padding of the last group, D model width, F expert width, H rows of fc1, S slots, n rows of
one group, m >= n padded.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values.activation import gated, gated_backward
from ..values.channel_weights import ChannelExpertWeights
from ..values.expert_weights import ExpertWeights, SlotTable
from ..values.grouping import Grouping
from ..values.main_grads import MainGrads
from ..values.quantized_weights import SlotWeights
from ..values.row_channels import RowChannels
from .quantized import quantized_linear
from .row_stable import bf16_row_stable_linear


class Span(NamedTuple):
    """A group's rows in expert order, and the slot of its expert."""

    slot: int
    start: int
    end: int


def spans_of(
    grouping: Grouping, experts: SlotTable, only: Iterable[int] | None = None
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


def rounded(num_rows: int, x_TD: Tensor) -> int:
    """Round ``num_rows`` up to five significant bits if code is compiled for each number.

    That leaves 16 sizes from each power of two to the next, with 2 % more rows on average.
    """
    if x_TD.dtype != torch.bfloat16 or x_TD.is_cuda:
        return num_rows
    unit = 1 << max(0, num_rows.bit_length() - 5)
    return -(-num_rows // unit) * unit


def _tokens_M(grouping: Grouping, spans: list[Span], x_TD: Tensor) -> Tensor:
    """Return the token of each of the N rows, and token 0 for the padding rows after them."""
    num_rows = spans[-1].end if spans else 0
    most = max((start + rounded(end - start, x_TD) for _, start, end in spans), default=0)
    return F.pad(grouping.tokens_R[:num_rows], (0, most - num_rows))


def infer(
    x_TD: Tensor,
    grouping: Grouping,
    experts: SlotWeights,
    spans: list[Span],
    out_RD: Tensor,
    channels: RowChannels | None = None,
) -> None:
    """Write the outputs of the groups into their lines of ``out_RD``; keep nothing for backward.

    In bf16 a row's bits do not depend on how many rows its group has.
    """
    tokens_R = grouping.tokens_R
    for slot, start, end in spans:
        x_nD = x_TD.index_select(0, tokens_R[start:end])
        bias1_H, bias2_D = experts.biases(slot, x_TD.dtype)
        if isinstance(experts, ChannelExpertWeights):
            expert = experts.expert_in(slot)
            fc1_HD, fc2_DF = experts.matrices(slot, x_TD.dtype)
            h_nH = bf16_row_stable_linear(experts.keep_x(x_nD, expert), fc1_HD)
            act_nF = experts.activate(_with_bias(h_nH, bias1_H), expert)
            if channels is not None:
                act_nF = channels.of(act_nF, grouping.order_R[start:end])
            y_nD = bf16_row_stable_linear(act_nF, fc2_DF)
        elif isinstance(experts, ExpertWeights):
            h_nH = _with_bias(bf16_row_stable_linear(x_nD, experts.fc1_SHD[slot]), bias1_H)
            act_nF = gated(h_nH, experts.activation)
            y_nD = bf16_row_stable_linear(act_nF, experts.fc2_SDF[slot])
        else:
            h_nH = _with_bias(quantized_linear(x_nD, experts.fc1, slot), bias1_H)
            y_nD = quantized_linear(gated(h_nH, experts.activation), experts.fc2, slot)
        out_RD[start:end] = _with_bias(y_nD, bias2_D)


def _with_bias(y_nQ: Tensor, bias_Q: Tensor | None) -> Tensor:
    """Add a bias to every row, in place."""
    return y_nQ if bias_Q is None else y_nQ.add_(bias_Q)


def forward(
    x_TD: Tensor, grouping: Grouping, experts: ExpertWeights, spans: list[Span]
) -> tuple[Tensor, Tensor]:
    """Return pre-activations ``h_MH``, which backward needs, and outputs ``y_MD``."""
    tokens_M = _tokens_M(grouping, spans, x_TD)
    h_MH = x_TD.new_empty(len(tokens_M), experts.fc1_SHD.shape[1])
    y_MD = x_TD.new_empty(len(tokens_M), x_TD.shape[1])
    for slot, start, end in spans:
        rows = slice(start, start + rounded(end - start, x_TD))
        h_mH, y_mD = h_MH[rows], y_MD[rows]
        bias1_H, bias2_D = experts.biases(slot, x_TD.dtype)
        torch.mm(x_TD.index_select(0, tokens_M[rows]), experts.fc1_SHD[slot].t(), out=h_mH)
        _with_bias(h_mH, bias1_H)
        torch.mm(gated(h_mH, experts.activation), experts.fc2_SDF[slot].t(), out=y_mD)
        _with_bias(y_mD, bias2_D)
    return h_MH, y_MD


def pre_activations(
    x_TD: Tensor, grouping: Grouping, experts: ExpertWeights, spans: list[Span]
) -> Tensor:
    """Compute ``h_MH`` again, with the bits of :func:`forward`: rows have the same places."""
    tokens_M = _tokens_M(grouping, spans, x_TD)
    h_MH = x_TD.new_empty(len(tokens_M), experts.fc1_SHD.shape[1])
    for slot, start, end in spans:
        rows = slice(start, start + rounded(end - start, x_TD))
        x_mD = x_TD.index_select(0, tokens_M[rows])
        torch.mm(x_mD, experts.fc1_SHD[slot].t(), out=h_MH[rows])
        _with_bias(h_MH[rows], experts.biases(slot, x_TD.dtype)[0])
    return h_MH


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    h_MH: Tensor,
    grouping: Grouping,
    experts: ExpertWeights,
    spans: list[Span],
    sums: MainGrads,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of each row's x, ``[M, D]``, and of ``weights_TK``.

    Parameter gradients are left in ``sums``.
    """
    grad_x_MD = x_TD.new_empty(h_MH.shape[0], x_TD.shape[1])
    grad_weights_R = torch.zeros_like(weights_TK).reshape(-1)
    tokens_M = _tokens_M(grouping, spans, x_TD)
    weights_R1 = weights_TK.reshape(-1).index_select(0, grouping.order_R).unsqueeze(-1)
    for slot, start, end in spans:
        rows = slice(start, start + rounded(end - start, x_TD))
        weight_m1 = F.pad(weights_R1[start:end], (0, 0, 0, rows.stop - end))
        grad_mD = grad_TD.index_select(0, tokens_M[rows])
        unscaled_mF = torch.mm(grad_mD, experts.fc2_SDF[slot])
        grad_act_mF = (unscaled_mF * weight_m1).to(unscaled_mF.dtype)
        act_mF, grad_h_mH = gated_backward(h_MH[rows], grad_act_mF, experts.activation)
        # <dy_t, y_row> = <dy_t W2, act> + <dy_t, b2>, so the outputs need not be kept.
        grad_weights_m = (unscaled_mF * act_mF).sum(dim=-1, dtype=weights_TK.dtype)
        if experts.fc2_bias_SD is not None:
            bias2_D = experts.fc2_bias_SD[slot]
            grad_weights_m += (grad_mD * bias2_D).sum(dim=-1, dtype=weights_TK.dtype)
        grad_weights_R[start:end] = grad_weights_m[: end - start]
        if sums.fc1_bias_SH is not None:
            _add(sums.fc1_bias_SH[slot], grad_h_mH.sum(dim=0), sums.is_empty)
        if sums.fc2_bias_SD is not None:
            _add(sums.fc2_bias_SD[slot], (grad_mD * weight_m1).sum(dim=0), sums.is_empty)
        if sums.fc2_SDF is not None:
            scaled_act_mF = (act_mF * weight_m1).to(act_mF.dtype)
            _add_product(sums.fc2_SDF[slot], grad_mD, scaled_act_mF, sums.is_empty)
        if sums.fc1_SHD is not None:
            x_mD = x_TD.index_select(0, tokens_M[rows])
            _add_product(sums.fc1_SHD[slot], grad_h_mH, x_mD, sums.is_empty)
        torch.mm(grad_h_mH, experts.fc1_SHD[slot], out=grad_x_MD[rows])
    if sums.is_empty:
        _zero_others(sums, spans, experts.num_slots)
    return grad_x_MD, grad_weights_R.index_select(0, grouping.inverse_R).view_as(weights_TK)


def _add_product(total_QP: Tensor, grad_nQ: Tensor, x_nP: Tensor, is_empty: bool) -> None:
    """Add ``grad.T @ x`` to a sum that may be wider, or write it if there is no sum yet."""
    if total_QP.dtype != grad_nQ.dtype:
        _add(total_QP, torch.mm(grad_nQ.t(), x_nP), is_empty)
    elif is_empty:
        torch.mm(grad_nQ.t(), x_nP, out=total_QP)
    else:
        total_QP.addmm_(grad_nQ.t(), x_nP)


def _add(total: Tensor, part: Tensor, is_empty: bool) -> None:
    """Add to a sum that may have another type, or write it if there is no sum yet."""
    if is_empty:
        total.copy_(part)
    else:
        total.add_(part)


def _zero_others(sums: MainGrads, spans: list[Span], num_slots: int) -> None:
    """Fill the sums of experts without rows; the others have just been written."""
    for slot in set(range(num_slots)) - {span.slot for span in spans}:
        for total in sums.totals:
            if total is not None:
                total[slot].zero_()
