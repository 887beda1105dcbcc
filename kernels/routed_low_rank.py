"""Low-rank products where each row has the factors of its expert: ``w s B_e (A_e x)``.

LoRA experts (LLaVA-MoLE, Chen et al. 2024): small A and B next to frozen matrices that all rows
share. One grouped product is for the A of all experts, and one for their B.

T rows, N <= T rows that have an expert, in expert order, E experts, P rank, I inputs, Q outputs.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .grouped_linear import grouped_linear, grouped_sums, grouped_transposed
from .linear import linear_by_group
from .torch_ops.loop import Span
from .values.grouping import group_tokens


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Which rows go to which expert."""

    rows_N: Tensor
    """int64: rows in expert order."""
    spans: list[Span]
    """The experts that have rows, and where those are in ``rows_N``."""


def group_rows(experts_T: Tensor, num_experts: int) -> RowGroups:
    """Group rows by expert, -1 = none. Waits for a GPU. Raises ``ValueError`` for unknown ids."""
    grouping = group_tokens(experts_T.unsqueeze(1), num_experts)
    bounds = grouping.offsets_E1.tolist()
    pairs = enumerate(pairwise(bounds))
    spans = [Span(expert, start, end) for expert, (start, end) in pairs if start < end]
    return RowGroups(grouping.order_R[: bounds[-1]], spans)


def routed_low_rank(
    x_TI: Tensor,
    a_EPI: Tensor,
    b_EQP: Tensor,
    groups: RowGroups,
    scale: float,
    weights_T: Tensor | None = None,
) -> Tensor:
    """Return ``y_t = w_t s B_e A_e x_t``, ``[T, Q]`` in x's dtype; 0 in rows without an expert.

    ``weights_T`` None = 1. Differentiable in x, A, B and the weights. Forward keeps x and ``A x``.
    """
    y_TQ: Tensor = _RoutedLowRank.apply(x_TI, a_EPI, b_EQP, weights_T, groups, scale)
    return y_TQ


def served_low_rank(x_TI: Tensor, a_EPI: Tensor, b_EQP: Tensor, groups: RowGroups) -> Tensor:
    """Return ``B_e A_e x_t`` for inference, ``[T, Q]``: on the CPU, rows are independent."""
    x_NI = x_TI.index_select(0, groups.rows_N)
    low_NP = linear_by_group(x_NI, a_EPI, groups.spans)
    y_NQ = linear_by_group(low_NP, b_EQP, groups.spans)
    y_TQ = x_TI.new_zeros(len(x_TI), b_EQP.shape[1])
    return y_TQ.index_copy_(0, groups.rows_N, y_NQ)


class _RoutedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        a_EPI: Tensor,
        b_EQP: Tensor,
        weights_T: Tensor | None,
        groups: RowGroups,
        scale: float,
    ) -> Tensor:
        low_NP = grouped_linear(x_TI.index_select(0, groups.rows_N), a_EPI, groups.spans)
        y_NQ = grouped_linear(low_NP, b_EQP, groups.spans)
        factor = _factor(weights_T, groups, scale)
        ctx.groups, ctx.scale = groups, scale
        ctx.save_for_backward(x_TI, a_EPI, b_EQP, weights_T, low_NP)
        y_TQ = x_TI.new_zeros(len(x_TI), b_EQP.shape[1])
        return y_TQ.index_copy_(0, groups.rows_N, (y_NQ * factor).to(x_TI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TQ: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, a_EPI, b_EQP, weights_T, low_NP = ctx.saved_tensors
        groups, num_experts, dtype = ctx.groups, len(a_EPI), x_TI.dtype
        factor = _factor(weights_T, groups, ctx.scale)
        grad_NQ = grad_TQ.index_select(0, groups.rows_N)
        plain_NP = grouped_transposed(grad_NQ, b_EQP, groups.spans)
        grad_low_NP = (plain_NP * factor).to(dtype)
        grad_x_TI = grad_weights_T = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grouped_transposed(grad_low_NP, a_EPI, groups.spans)
            grad_x_TI = torch.zeros_like(x_TI).index_copy_(0, groups.rows_N, grad_x_NI)
        if weights_T is not None:
            # <dy, s B A x> = <s B^T dy, A x>, so the products with B need not be kept.
            dots_N = (plain_NP * low_NP).sum(dim=-1, dtype=weights_T.dtype) * ctx.scale
            grad_weights_T = torch.zeros_like(weights_T).index_copy_(0, groups.rows_N, dots_N)
        x_NI = x_TI.index_select(0, groups.rows_N)
        grad_a_EPI = grouped_sums(grad_low_NP, x_NI, num_experts, groups.spans)
        scaled_NQ = (grad_NQ * factor).to(dtype)
        grad_b_EQP = grouped_sums(scaled_NQ, low_NP, num_experts, groups.spans)
        return grad_x_TI, grad_a_EPI, grad_b_EQP, grad_weights_T, None, None


def _factor(weights_T: Tensor | None, groups: RowGroups, scale: float) -> Tensor | float:
    """Return ``w s`` of each row, ``[N, 1]``, or s alone."""
    if weights_T is None:
        return scale
    return weights_T.index_select(0, groups.rows_N).unsqueeze(-1) * scale
