"""Weight gradients: for each slot, ``left_rows^T @ right_rows`` over the rows of its group.

T tokens, K choices, R routed rows in slot order, S slots, Q x P one slot's weight. In a tile: M of
Q, N of P, and P rows at a time, named I here.
"""

import triton
import triton.language as tl
from torch import Tensor

from .grouping import SlotGroups
from .tile_math import add_product, tile_and_column
from .tiles import GROUP_TILES, Tiles


def weight_grad(
    left_XQ: Tensor,
    right_XP: Tensor,
    groups: SlotGroups,
    out_SQP: Tensor,
    precision: str,
    tiles: Tiles,
    *,
    num_choices: int,
    left_is_by_token: bool,
    add: bool,
) -> None:
    """Write each slot's gradient to ``out_SQP``, or ``add`` it, summed in fp32.

    One factor has a line per token and the other one per row in slot order, as
    ``left_is_by_token`` says.
    """
    num_slots, num_lines, num_columns = out_SQP.shape
    num_programs = num_slots * triton.cdiv(num_lines, tiles.M) * triton.cdiv(num_columns, tiles.N)
    weight_grad_kernel[(num_programs,)](
        left_XQ,
        right_XP,
        groups.order_R,
        groups.offsets_S1,
        out_SQP,
        num_lines,
        num_columns,
        left_XQ.stride(0),
        right_XP.stride(0),
        out_SQP.stride(0),
        CHOICES=num_choices,
        LEFT_IS_BY_TOKEN=left_is_by_token,
        ADD=add,
        PRECISION=precision,
        M=tiles.M,
        N=tiles.N,
        P=tiles.P,
        GROUP_TILES=GROUP_TILES,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


@triton.jit
def weight_grad_kernel(
    left_XQ,
    right_XP,
    order_R,
    offsets_S1,
    out_SQP,
    num_lines,
    num_columns,
    stride_left,
    stride_right,
    stride_slot,
    CHOICES: tl.constexpr,
    LEFT_IS_BY_TOKEN: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    tiles_down, tiles_across = tl.cdiv(num_lines, M), tl.cdiv(num_columns, N)
    slot = tl.program_id(0) // (tiles_down * tiles_across)
    inside = tl.program_id(0) % (tiles_down * tiles_across)
    start = tl.load(offsets_S1 + slot)
    end = tl.load(offsets_S1 + slot + 1)
    if ADD:  # noqa: SIM102  (decided when compiling, the next one on the device)
        if start == end:
            return
    down, across = tile_and_column(inside, tiles_down, tiles_across, GROUP_TILES, False)
    line_M, column_N = down * M + tl.arange(0, M), across * N + tl.arange(0, N)
    is_line_M, is_column_N = line_M < num_lines, column_N < num_columns
    out_at = out_SQP + slot.to(tl.int64) * stride_slot
    out_at = out_at + line_M[:, None] * num_columns + column_N[None, :]
    is_out = is_line_M[:, None] & is_column_N[None, :]
    if ADD:
        # Loaded before the loop: loaded after it, next to the sum, it would spill.
        sum_MN = tl.load(out_at, mask=is_out, other=0).to(tl.float32)
    else:
        sum_MN = tl.zeros((M, N), dtype=tl.float32)
    left_at = left_XQ + line_M[None, :]
    right_at = right_XP + column_N[None, :]
    # Only the last step masks rows: masks in every step took as long as the products.
    whole = start + (end - start) // P * P
    for first in range(start, whole, P):
        row_I = first + tl.arange(0, P)
        token_I = tl.load(order_R + row_I) // CHOICES
        left_row_I = (token_I if LEFT_IS_BY_TOKEN else row_I).to(tl.int64)
        right_row_I = (row_I if LEFT_IS_BY_TOKEN else token_I).to(tl.int64)
        left_IM = tl.load(
            left_at + left_row_I[:, None] * stride_left, mask=is_line_M[None, :], other=0
        )
        right_IN = tl.load(
            right_at + right_row_I[:, None] * stride_right, mask=is_column_N[None, :], other=0
        )
        sum_MN = add_product(sum_MN, tl.trans(left_IM), right_IN, PRECISION)
    if whole < end:
        row_I = whole + tl.arange(0, P)
        is_row_I = row_I < end
        token_I = tl.load(order_R + row_I, mask=is_row_I, other=0) // CHOICES
        left_row_I = (token_I if LEFT_IS_BY_TOKEN else row_I).to(tl.int64)
        right_row_I = (row_I if LEFT_IS_BY_TOKEN else token_I).to(tl.int64)
        left_IM = tl.load(
            left_at + left_row_I[:, None] * stride_left,
            mask=is_row_I[:, None] & is_line_M[None, :],
            other=0,
        )
        right_IN = tl.load(
            right_at + right_row_I[:, None] * stride_right,
            mask=is_row_I[:, None] & is_column_N[None, :],
            other=0,
        )
        sum_MN = add_product(sum_MN, tl.trans(left_IM), right_IN, PRECISION)
    tl.store(out_at, sum_MN.to(out_SQP.dtype.element_ty), mask=is_out)
