"""Shared by the router's kernels: scores of tiles, and keys that order experts and groups.

M rows of a tile, N lanes (experts and padding), K choices, G groups, W experts of a group.
"""

import triton
import triton.language as tl

from ..values import choice

EPSILON = tl.constexpr(choice.EPSILON)
NO_KEY = tl.constexpr(-1)
"""Below all keys: padding, and experts out of reach."""
TAKEN = tl.constexpr(-2)


@triton.jit
def softmax_parts(logit_MN):
    """Return exp(logit - top), its sum and the top of each row."""
    top_M = tl.max(logit_MN, axis=1)
    exp_MN = tl.exp(logit_MN - top_M[:, None])
    return exp_MN, tl.sum(exp_MN, axis=1), top_M


@triton.jit
def scores_of_chosen(logit_MK, is_choice_MK, top_M, total_M, IS_SIGMOID: tl.constexpr):
    """Return the scores of the chosen experts, 0 in padding."""
    if IS_SIGMOID:
        score_MK = tl.sigmoid(logit_MK)
    else:
        score_MK = tl.exp(logit_MK - top_M[:, None]) / total_M[:, None]
    return tl.where(is_choice_MK, score_MK, 0.0)


@triton.jit
def key_of(value, name):
    """Return an int64 that orders by value and, where values are equal, lower names first."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((ordered.to(tl.int64) + 0x80000000) << 16) | (0xFFFF - name)


@triton.jit
def name_in(key):
    """Return the name in a key."""
    return (0xFFFF - (key & 0xFFFF)).to(tl.int32)


@triton.jit
def value_in(key):
    """Return the value in a key."""
    ordered = ((key >> 16) - 0x80000000).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def within_best_groups(
    key_MN,
    num_groups,
    top_groups,
    GROUP_BEST: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Keep only the keys of the groups whose best values have the largest sums."""
    key_MGW = tl.reshape(key_MN, (M, GROUPS, WIDTH))
    left_MGW = key_MGW
    sum_MG = tl.zeros((M, GROUPS), dtype=tl.float32)
    for _ in tl.static_range(GROUP_BEST):
        best_MG = tl.max(left_MGW, axis=2)
        sum_MG += tl.where(best_MG >= 0, value_in(best_MG), 0.0)  # a group may have one expert only
        left_MGW = tl.where(left_MGW == best_MG[:, :, None], NO_KEY, left_MGW)
    group_G = tl.arange(0, GROUPS)
    group_key_MG = tl.where(
        (group_G < num_groups)[None, :], key_of(sum_MG, group_G[None, :]), NO_KEY
    )
    for _ in range(top_groups):
        best_M = tl.max(group_key_MG, axis=1)
        group_key_MG = tl.where(group_key_MG == best_M[:, None], TAKEN, group_key_MG)
    key_MGW = tl.where((group_key_MG == TAKEN)[:, :, None], key_MGW, NO_KEY)
    return tl.reshape(key_MGW, (M, GROUPS * WIDTH))
