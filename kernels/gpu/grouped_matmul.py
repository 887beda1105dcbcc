"""Rows in slot order times their slot's matrix: fc2 of the forward pass, and grad x of fc1.

R routed rows in slot order, S slots, L tiles, Q outputs, P inputs of the matrix. In a tile: M rows,
N of Q, P at a time.
"""

import triton
import triton.language as tl
from torch import Tensor

from .grouping import SlotGroups
from .tile_math import add_product, tile_and_column
from .tiles import GROUP_TILES, Tiles


def grouped_matmul(
    x_RP: Tensor,
    weight_SPQ: Tensor,
    bias_SQ: Tensor | None,
    groups: SlotGroups,
    precision: str,
    tiles: Tiles,
) -> Tensor:
    """Return ``x_r @ weight_slot(r) + bias_slot(r)``, ``[R, Q]``; undefined without a slot.

    ``weight_SPQ`` may be a transposed view: either of its last two dimensions is contiguous.
    """
    num_rows, num_inner = x_RP.shape
    num_outputs = weight_SPQ.shape[2]
    y_RQ = x_RP.new_empty(num_rows, num_outputs)
    num_tiles = groups.tiles_L2.shape[0]
    grouped_matmul_kernel[(num_tiles * triton.cdiv(num_outputs, tiles.N),)](
        x_RP,
        groups.tiles_L2,
        groups.offsets_S1,
        weight_SPQ,
        bias_SQ,
        y_RQ,
        num_tiles,
        num_inner,
        num_outputs,
        weight_SPQ.stride(0),
        weight_SPQ.stride(1),
        weight_SPQ.stride(2),
        0 if bias_SQ is None else bias_SQ.stride(0),
        IS_EVEN=num_inner % tiles.P == 0,
        PRECISION=precision,
        M=tiles.M,
        N=tiles.N,
        P=tiles.P,
        GROUP_TILES=GROUP_TILES,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return y_RQ


@triton.jit
def grouped_matmul_kernel(
    x_RP,
    tiles_L2,
    offsets_S1,
    weight_SPQ,
    bias_SQ,
    y_RQ,
    num_tiles,
    num_inner,
    num_outputs,
    stride_slot,
    stride_inner,
    stride_output,
    stride_bias,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    num_columns = tl.cdiv(num_outputs, N)
    # The rows are read in order, so a row tile stays in L2 for all its columns.
    tile, column = tile_and_column(tl.program_id(0), num_tiles, num_columns, GROUP_TILES, True)
    slot = tl.load(tiles_L2 + 2 * tile)
    if slot < 0:
        return
    row_M = tl.load(tiles_L2 + 2 * tile + 1) + tl.arange(0, M)
    end = tl.load(offsets_S1 + slot + 1)
    is_row_M = row_M < end
    # Rows after the group's end read its last row and are masked in the store.
    x_row_M = tl.minimum(row_M, end - 1).to(tl.int64)
    output_N = column * N + tl.arange(0, N)
    is_output_N = output_N < num_outputs
    inner_P = tl.arange(0, P)
    x_at = x_RP + x_row_M[:, None] * num_inner + inner_P[None, :]
    w_at = weight_SPQ + slot.to(tl.int64) * stride_slot
    w_at = w_at + inner_P[:, None] * stride_inner + output_N[None, :] * stride_output
    y_MN = tl.zeros((M, N), dtype=tl.float32)
    for first in range(0, num_inner, P):
        if IS_EVEN:
            x_MP = tl.load(x_at)
            w_PN = tl.load(w_at, mask=is_output_N[None, :], other=0)
        else:
            is_inner_P = first + inner_P < num_inner
            x_MP = tl.load(x_at, mask=is_inner_P[None, :], other=0)
            w_PN = tl.load(w_at, mask=is_inner_P[:, None] & is_output_N[None, :], other=0)
        y_MN = add_product(y_MN, x_MP, w_PN, PRECISION)
        x_at += P
        w_at += P * stride_inner
    if bias_SQ is not None:
        bias_at = bias_SQ + slot.to(tl.int64) * stride_bias + output_N
        y_MN += tl.load(bias_at, mask=is_output_N, other=0).to(tl.float32)[None, :]
    tl.store(
        y_RQ + row_M.to(tl.int64)[:, None] * num_outputs + output_N[None, :],
        y_MN.to(y_RQ.dtype.element_ty),
        mask=is_row_M[:, None] & is_output_N[None, :],
    )
