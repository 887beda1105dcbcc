"""The gradient of the logits, from those of the weights and of the loss sums, in one pass.

Scores are computed again from the logits. The logits and their gradient are the only tensors of
size [T, E]. With s the scores, w = c s / S of the chosen (S their sum), for a row:
grad s_k = c / S (g_k - <g, s> / S) over the chosen; a probability p = s / sum(s) adds its own; and
through a softmax grad l = s (grad s - <grad s, s>), through a sigmoid grad l = grad s * s (1 - s).

T tokens, E experts, K choices. In a tile: M rows, N lanes, K choices padded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..values.choice import ChoiceRule
from .router import rows_of, warps_of
from .router_math import EPSILON, scores_of_chosen, softmax_parts


def route_grad(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    grad_weights_TK: Tensor | None,
    grad_sums_E: Tensor | None,
    grad_z: Tensor | None,
) -> Tensor:
    """Return the gradient of the logits, ``[T, E]``; None means that a gradient is zero."""
    num_tokens, num_experts = logits_TE.shape
    grad_TE = torch.empty_like(logits_TE)
    if num_tokens == 0:
        return grad_TE
    num_lanes = triton.next_power_of_2(num_experts)
    rows = rows_of(num_lanes)
    route_grad_kernel[(triton.cdiv(num_tokens, rows),)](
        logits_TE,
        chosen_TK,
        valid_T,
        grad_weights_TK,
        grad_sums_E,
        grad_z,
        grad_TE,
        num_tokens,
        num_experts,
        rule.scale,
        IS_SIGMOID=rule.score == "sigmoid",
        RENORMALIZE=rule.renormalize,
        CHOICES=rule.k,
        ALL_CHOICES=triton.next_power_of_2(rule.k),
        M=rows,
        N=num_lanes,
        num_warps=warps_of(num_lanes),
    )
    return grad_TE


@triton.jit
def route_grad_kernel(
    logits_TE,
    chosen_TK,
    valid_T,
    grad_weights_TK,
    grad_sums_E,
    grad_z,
    grad_TE,
    num_tokens,
    num_experts,
    scale,
    IS_SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    CHOICES: tl.constexpr,
    ALL_CHOICES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    expert_N = tl.arange(0, N)
    is_expert_N = expert_N < num_experts
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    is_row_M = row_M < num_tokens
    line_M = row_M.to(tl.int64) * num_experts
    at_MN = line_M[:, None] + expert_N[None, :]
    is_logit_MN = is_row_M[:, None] & is_expert_N[None, :]
    logit_MN = tl.load(logits_TE + at_MN, mask=is_logit_MN, other=0)
    logit_MN = tl.where(is_expert_N[None, :], logit_MN, float("-inf"))
    exp_MN, total_M, top_M = softmax_parts(logit_MN)
    softmax_MN = exp_MN / total_M[:, None]
    score_MN = tl.sigmoid(logit_MN) if IS_SIGMOID else softmax_MN
    grad_score_MN = tl.zeros((M, N), dtype=tl.float32)
    if grad_weights_TK is not None:
        # grad s = factor * (g - mean), factor and mean of the row.
        factor_M = tl.zeros((M,), dtype=tl.float32) + scale
        mean_M = tl.zeros((M,), dtype=tl.float32)
        first_M = row_M.to(tl.int64) * CHOICES
        if RENORMALIZE:
            choice_K = tl.arange(0, ALL_CHOICES)
            is_choice_MK = is_row_M[:, None] & (choice_K < CHOICES)[None, :]
            at_MK = first_M[:, None] + choice_K[None, :]
            chosen_MK = tl.load(chosen_TK + at_MK, mask=is_choice_MK, other=0)
            chosen_at = logits_TE + line_M[:, None] + chosen_MK
            chosen_logit_MK = tl.load(chosen_at, mask=is_choice_MK, other=0)
            chosen_score_MK = scores_of_chosen(
                chosen_logit_MK, is_choice_MK, top_M, total_M, IS_SIGMOID
            )
            grad_MK = tl.load(grad_weights_TK + at_MK, mask=is_choice_MK, other=0)
            sum_M = tl.sum(chosen_score_MK, axis=1) + EPSILON
            factor_M /= sum_M
            mean_M = tl.sum(grad_MK * chosen_score_MK, axis=1) / sum_M
        for choice in range(CHOICES):
            chosen_M = tl.load(chosen_TK + first_M + choice, mask=is_row_M, other=0)
            grad_M = tl.load(grad_weights_TK + first_M + choice, mask=is_row_M, other=0)
            is_chosen_MN = expert_N[None, :] == chosen_M[:, None]
            grad_M = factor_M * (grad_M - mean_M)
            grad_score_MN = tl.where(is_chosen_MN, grad_M[:, None], grad_score_MN)
    is_counted_M = is_row_M
    if valid_T is not None:
        is_counted_M &= tl.load(valid_T + row_M, mask=is_row_M, other=0) != 0
    if grad_sums_E is not None:
        grad_p_MN = tl.load(grad_sums_E + expert_N, mask=is_expert_N, other=0)[None, :]
        if IS_SIGMOID:
            sum_M = tl.sum(score_MN, axis=1) + EPSILON
            mean_M = tl.sum(grad_p_MN * score_MN, axis=1) / sum_M
            grad_p_MN = (grad_p_MN - mean_M[:, None]) / sum_M[:, None]
        grad_score_MN += tl.where(is_counted_M[:, None], grad_p_MN, 0.0)
    if IS_SIGMOID:
        grad_MN = grad_score_MN * score_MN * (1 - score_MN)
    else:
        mean_M = tl.sum(grad_score_MN * score_MN, axis=1)
        grad_MN = score_MN * (grad_score_MN - mean_M[:, None])
    if grad_z is not None:
        slope_M = tl.load(grad_z) * 2 * (top_M + tl.log(total_M))
        grad_MN += tl.where(is_counted_M, slope_M, 0.0)[:, None] * softmax_MN
    tl.store(grad_TE + at_MN, grad_MN, mask=is_logit_MN)
