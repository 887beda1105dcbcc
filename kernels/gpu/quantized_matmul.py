"""fc2 on weights in 8 or 4 bits; see quantized.py.

R routed rows in slot order, S slots, L tiles, Q outputs, P inputs and G groups of a matrix. In a
tile: M rows, N of Q, P inputs at a time in B bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..values.quantized_weights import QuantizedMatrices
from .grouping import SlotGroups
from .quantized import constants, quantized_product
from .tile_math import tile_and_column
from .tiles import Tiles


def quantized_matmul(
    x_RP: Tensor,
    matrices: QuantizedMatrices,
    bias_SQ: Tensor | None,
    groups: SlotGroups,
    precision: str,
    tiles: Tiles,
) -> Tensor:
    """Return ``x_r @ matrix_slot(r)^T + bias_slot(r)``, ``[R, Q]``; undefined without a slot."""
    num_rows, num_inner = x_RP.shape
    num_outputs = matrices.values.shape[1]
    y_RQ = x_RP.new_empty(num_rows, num_outputs)
    num_tiles = groups.tiles_L2.shape[0]
    quantized_matmul_kernel[(num_tiles * triton.cdiv(num_outputs, tiles.N),)](
        x_RP,
        groups.tiles_L2,
        groups.offsets_S1,
        matrices.values,
        matrices.scales_SQG,
        bias_SQ,
        y_RQ,
        num_tiles,
        num_inner,
        num_outputs,
        matrices.group_size,
        matrices.values.stride(0),
        matrices.values.stride(1),
        matrices.scales_SQG.stride(0),
        matrices.scales_SQG.stride(1),
        0 if bias_SQ is None else bias_SQ.stride(0),
        **constants(matrices, precision, tiles),
    )
    return y_RQ


@triton.jit
def quantized_matmul_kernel(
    x_RP,
    tiles_L2,
    offsets_S1,
    values_SQB,
    scales_SQG,
    bias_SQ,
    y_RQ,
    num_tiles,
    num_inner,
    num_outputs,
    group_size,
    stride_slot,
    stride_row,
    stride_scale_slot,
    stride_scale_row,
    stride_bias,
    BITS: tl.constexpr,
    IS_PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    num_columns = tl.cdiv(num_outputs, N)
    # The rows are read in order, so a row tile stays in L2 for all its columns.
    tile, column = tile_and_column(tl.program_id(0), num_tiles, num_columns, GROUP_TILES, True)
    slot = tl.load(tiles_L2 + 2 * tile).to(tl.int64)
    if slot < 0:
        return
    row_M = tl.load(tiles_L2 + 2 * tile + 1) + tl.arange(0, M)
    end = tl.load(offsets_S1 + slot + 1)
    # Rows after the group's end read its last row and are masked in the store.
    x_row_M = tl.minimum(row_M, end - 1).to(tl.int64)
    output_N = column * N + tl.arange(0, N)
    is_output_N = output_N < num_outputs
    byte_B = tl.arange(0, P * BITS // 8)
    y_MN = quantized_product(
        x_RP + x_row_M[:, None] * num_inner + tl.arange(0, P)[None, :],
        values_SQB + slot * stride_slot + output_N[:, None] * stride_row + byte_B[None, :],
        scales_SQG + slot * stride_scale_slot + output_N * stride_scale_row,
        is_output_N,
        num_inner,
        group_size,
        BITS,
        IS_PER_ROW,
        PRECISION,
        M,
        N,
        P,
    )
    if bias_SQ is not None:
        bias_at = bias_SQ + slot * stride_bias + output_N
        y_MN += tl.load(bias_at, mask=is_output_N, other=0).to(tl.float32)[None, :]
    tl.store(
        y_RQ + row_M.to(tl.int64)[:, None] * num_outputs + output_N[None, :],
        y_MN.to(y_RQ.dtype.element_ty),
        mask=(row_M < end)[:, None] & is_output_N[None, :],
    )
