"""The choice of experts in one pass over the logits: scores, top-k, weights, counts, loss sums.

A program processes blocks of rows and keeps its counts and sums in registers. It writes them once,
and a second kernel adds up the programs' lines in order. No atomics: the same bits in every run.

T tokens, E experts, K choices, G groups of experts, B programs. In a tile: M rows, N lanes (experts
and padding), K choices padded to a power of two.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..values.choice import ChoiceRule
from .router_math import (
    EPSILON,
    NO_KEY,
    TAKEN,
    key_of,
    name_in,
    scores_of_chosen,
    softmax_parts,
    within_best_groups,
)

TILE = 2048
"""Lanes times rows of a tile: 16 a thread, not measured yet. It depends on the number of experts
alone, so that a row's bits do not depend on the other rows."""
MAX_ROWS = 32
MAX_PROGRAMS = 1024
"""About eight on each of an H200's 132 multiprocessors; with more, adding up their lines takes
longer."""
FINISH_PARTS, FINISH_EXPERTS = 64, 32


def lanes(num_experts: int, num_groups: int) -> tuple[int, int]:
    """Return the padded numbers of groups and of experts per group, for the layout of lanes."""
    width = triton.next_power_of_2(num_experts // num_groups)
    return triton.next_power_of_2(num_groups), width


def rows_of(num_lanes: int) -> int:
    """Return M, the rows of a tile."""
    return max(1, min(MAX_ROWS, TILE // num_lanes))


def warps_of(num_lanes: int) -> int:
    """Return the warps of a program: more than 4 if 4 would spill."""
    return 8 if num_lanes >= 1024 else 4


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    wants_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return chosen ids and weights ``[T, K]``, counts ``[E]``, probability sums ``[E]``, z sum.

    Rows that are not valid get choices too, but are not counted. The sums are empty unless
    ``wants_sums``. All fp32, ids int32, counts int64.
    """
    num_tokens, num_experts = logits_TE.shape
    empty = functools.partial(torch.empty, device=logits_TE.device, dtype=torch.float32)
    chosen_TK = empty(num_tokens, rule.k, dtype=torch.int32)
    weights_TK = empty(num_tokens, rule.k)
    counts_E = empty(num_experts, dtype=torch.int64)
    sums_E = empty(num_experts if wants_sums else 0)
    z_sum = empty(() if wants_sums else 0)
    if num_tokens == 0:
        return chosen_TK, weights_TK, counts_E.zero_(), sums_E.zero_(), z_sum.zero_()
    groups, width = lanes(num_experts, rule.num_groups)
    rows = rows_of(groups * width)
    num_parts = min(MAX_PROGRAMS, triton.cdiv(num_tokens, rows))
    part_counts_BE = empty(num_parts, num_experts, dtype=torch.int32)
    part_sums_BE = empty(num_parts, num_experts) if wants_sums else None
    part_z_B = empty(num_parts) if wants_sums else None
    route_kernel[(num_parts,)](
        logits_TE,
        bias_E,
        valid_T,
        chosen_TK,
        weights_TK,
        part_counts_BE,
        part_sums_BE,
        part_z_B,
        num_tokens,
        num_experts,
        rule.num_groups,
        num_experts // rule.num_groups,
        rule.top_groups,
        rule.scale,
        IS_SIGMOID=rule.score == "sigmoid",
        RENORMALIZE=rule.renormalize,
        GROUP_BEST=rule.group_best,
        CHOICES=rule.k,
        ALL_CHOICES=triton.next_power_of_2(rule.k),
        GROUPS=groups,
        WIDTH=width,
        M=rows,
        num_warps=warps_of(groups * width),
    )
    finish_kernel[(triton.cdiv(num_experts, FINISH_EXPERTS),)](
        part_counts_BE,
        part_sums_BE,
        part_z_B,
        counts_E,
        sums_E if wants_sums else None,
        z_sum if wants_sums else None,
        num_parts,
        num_experts,
        FINISH_PARTS,
        FINISH_EXPERTS,
    )
    return chosen_TK, weights_TK, counts_E, sums_E, z_sum


@triton.jit
def route_kernel(
    logits_TE,
    bias_E,
    valid_T,
    chosen_TK,
    weights_TK,
    part_counts_BE,
    part_sums_BE,
    part_z_B,
    num_tokens,
    num_experts,
    num_groups,
    group_width,
    top_groups,
    scale,
    IS_SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    CHOICES: tl.constexpr,
    ALL_CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
):
    lane_N = tl.arange(0, GROUPS * WIDTH)
    if GROUPS == 1:
        expert_N = lane_N
        is_expert_N = expert_N < num_experts
    else:
        # Every group begins at a multiple of a power of two, so that reductions see whole groups.
        expert_N = lane_N // WIDTH * group_width + lane_N % WIDTH
        is_expert_N = (lane_N // WIDTH < num_groups) & (lane_N % WIDTH < group_width)
    choice_K = tl.arange(0, ALL_CHOICES)
    count_N = tl.zeros((GROUPS * WIDTH,), dtype=tl.int32)
    sum_N = tl.zeros((GROUPS * WIDTH,), dtype=tl.float32)
    z_M = tl.zeros((M,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, M), tl.num_programs(0)):
        row_M = block * M + tl.arange(0, M)
        is_row_M = row_M < num_tokens
        line_M = row_M.to(tl.int64) * num_experts
        is_logit_MN = is_row_M[:, None] & is_expert_N[None, :]
        logit_MN = tl.load(
            logits_TE + line_M[:, None] + expert_N[None, :], mask=is_logit_MN, other=0
        )
        logit_MN = tl.where(is_expert_N[None, :], logit_MN, float("-inf"))
        exp_MN, total_M, top_M = softmax_parts(logit_MN)
        score_MN = tl.sigmoid(logit_MN) if IS_SIGMOID else exp_MN / total_M[:, None]
        value_MN = score_MN
        if bias_E is not None:
            value_MN += tl.load(bias_E + expert_N, mask=is_expert_N, other=0)[None, :]
        key_MN = tl.where(is_expert_N[None, :], key_of(value_MN, expert_N[None, :]), NO_KEY)
        if GROUPS > 1:
            key_MN = within_best_groups(
                key_MN, num_groups, top_groups, GROUP_BEST, M, GROUPS, WIDTH
            )
        chosen_MK = tl.zeros((M, ALL_CHOICES), dtype=tl.int32)
        for choice in range(CHOICES):
            best_M = tl.max(key_MN, axis=1)
            key_MN = tl.where(key_MN == best_M[:, None], TAKEN, key_MN)
            chosen_MK = tl.where(choice_K[None, :] == choice, name_in(best_M)[:, None], chosen_MK)
        is_choice_MK = is_row_M[:, None] & (choice_K < CHOICES)[None, :]
        at_MK = row_M.to(tl.int64)[:, None] * CHOICES + choice_K[None, :]
        tl.store(chosen_TK + at_MK, chosen_MK, mask=is_choice_MK)
        chosen_at = logits_TE + line_M[:, None] + chosen_MK
        chosen_logit_MK = tl.load(chosen_at, mask=is_choice_MK, other=0)
        weight_MK = scores_of_chosen(chosen_logit_MK, is_choice_MK, top_M, total_M, IS_SIGMOID)
        if RENORMALIZE:
            weight_MK /= tl.sum(weight_MK, axis=1)[:, None] + EPSILON
        tl.store(weights_TK + at_MK, weight_MK * scale, mask=is_choice_MK)
        is_counted_M = is_row_M
        if valid_T is not None:
            is_counted_M &= tl.load(valid_T + row_M, mask=is_row_M, other=0) != 0
        is_counted_MN = is_counted_M[:, None] & (key_MN == TAKEN)
        count_N += tl.sum(is_counted_MN.to(tl.int32), axis=0)
        if part_sums_BE is not None:
            if IS_SIGMOID:
                score_MN /= tl.sum(score_MN, axis=1)[:, None] + EPSILON
            sum_N += tl.sum(tl.where(is_counted_M[:, None], score_MN, 0.0), axis=0)
            log_sum_M = top_M + tl.log(total_M)
            z_M += tl.where(is_counted_M, log_sum_M * log_sum_M, 0.0)
    part = tl.program_id(0).to(tl.int64) * num_experts + expert_N
    tl.store(part_counts_BE + part, count_N, mask=is_expert_N)
    if part_sums_BE is not None:
        tl.store(part_sums_BE + part, sum_N, mask=is_expert_N)
        tl.store(part_z_B + tl.program_id(0), tl.sum(z_M))


@triton.jit
def finish_kernel(
    part_counts_BE,
    part_sums_BE,
    part_z_B,
    counts_E,
    sums_E,
    z_sum,
    num_parts,
    num_experts,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Add up the programs' counts and sums."""
    expert_N = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    is_expert_N = expert_N < num_experts
    count_N = tl.zeros((EXPERTS,), dtype=tl.int64)
    sum_N = tl.zeros((EXPERTS,), dtype=tl.float32)
    z_C = tl.zeros((PARTS,), dtype=tl.float32)
    for first in range(0, num_parts, PARTS):
        part_C = first + tl.arange(0, PARTS)
        at_CN = part_C[:, None] * num_experts + expert_N[None, :]
        is_part_CN = (part_C < num_parts)[:, None] & is_expert_N[None, :]
        count_CN = tl.load(part_counts_BE + at_CN, mask=is_part_CN, other=0)
        count_N += tl.sum(count_CN.to(tl.int64), axis=0)
        if sums_E is not None:
            sum_N += tl.sum(tl.load(part_sums_BE + at_CN, mask=is_part_CN, other=0), axis=0)
            z_C += tl.load(part_z_B + part_C, mask=part_C < num_parts, other=0)
    tl.store(counts_E + expert_N, count_N, mask=is_expert_N)
    if sums_E is not None:
        tl.store(sums_E + expert_N, sum_N, mask=is_expert_N)
        if tl.program_id(0) == 0:
            tl.store(z_sum, tl.sum(z_C))
