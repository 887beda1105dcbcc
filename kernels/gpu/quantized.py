"""fc1 and fc2 on weights in 8 or 4 bits (values/quantized_weights.py), widened on their way.

A value becomes x's type exactly, products are summed in fp32, and sums are multiplied by the scale:
once at the end where a row has one scale, else once a group. So nothing is rounded that plain
weights would not round.

T tokens, K choices, R routed rows in slot order, S slots, L tiles, D model width, F expert width,
H = 2F; Q outputs, P inputs and G groups of a matrix. In a tile: M rows, N of Q (or N/2 features,
gate and up), P inputs at a time in B bytes.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..values.quantized_weights import INT4_ZERO, QuantizedMatrices
from .grouping import SlotGroups
from .tile_math import add_product, gated, tile_and_column
from .tiles import GROUP_TILES, Tiles

TWO_TO_23 = tl.constexpr(8388608.0)
"""From here to its double, fp32 numbers are whole and their lowest bits count them."""
TWO_TO_23_BITS = tl.constexpr(0x4B000000)
ZERO_OF_INT4 = tl.constexpr(INT4_ZERO)


def quantized_up_projection(
    x_TD: Tensor,
    groups: SlotGroups,
    fc1: QuantizedMatrices,
    bias_SH: Tensor | None,
    activation: str,
    precision: str,
    tiles: Tiles,
    a_RF: Tensor,
) -> None:
    """Write ``act(x W_gate) * (x W_up)`` of the rows that have a slot, with biases if any."""
    num_tiles, d_expert = groups.tiles_L2.shape[0], a_RF.shape[1]
    quantized_up_kernel[(num_tiles * triton.cdiv(d_expert, tiles.N // 2),)](
        x_TD,
        groups.order_R,
        groups.tiles_L2,
        groups.offsets_S1,
        fc1.values,
        fc1.scales_SQG,
        bias_SH,
        a_RF,
        num_tiles,
        a_RF.shape[0] // x_TD.shape[0],
        x_TD.shape[1],
        d_expert,
        fc1.group_size,
        fc1.values.stride(0),
        fc1.values.stride(1),
        fc1.scales_SQG.stride(0),
        fc1.scales_SQG.stride(1),
        0 if bias_SH is None else bias_SH.stride(0),
        ACTIVATION=activation,
        **_constants(fc1, precision, tiles),
    )


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
        **_constants(matrices, precision, tiles),
    )
    return y_RQ


def _constants(matrices: QuantizedMatrices, precision: str, tiles: Tiles) -> dict[str, Any]:
    assert matrices.group_size % tiles.P == 0, "a step must lie within one group"
    return {
        "BITS": matrices.bits,
        "IS_PER_ROW": matrices.group_size == matrices.width,
        "PRECISION": precision,
        "M": tiles.M,
        "N": tiles.N,
        "P": tiles.P,
        "GROUP_TILES": GROUP_TILES,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@triton.jit
def widened(values_NB, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Return the values of some bytes in a type that holds them exactly, ``[N, P]``."""
    if BITS == 8:
        return values_NB.to(tl.float32).to(TYPE)
    else:
        # A nibble below the bits of 2^23 makes 2^23 + nibble: two operations in place of a
        # conversion, of which a processor does a few at a time.
        word_NB = values_NB.to(tl.int32)
        low_NB = (word_NB & 15 | TWO_TO_23_BITS).to(tl.float32, bitcast=True)
        high_NB = (word_NB >> 4 | TWO_TO_23_BITS).to(tl.float32, bitcast=True)
        # Neighbours share a byte, so joining them moves nothing between threads.
        pair_NB2 = tl.join(low_NB, high_NB) - (TWO_TO_23 + ZERO_OF_INT4)
        return tl.reshape(pair_NB2, (values_NB.shape[0], 2 * values_NB.shape[1])).to(TYPE)


@triton.jit
def quantized_product(
    x_at_MP,
    values_at_NB,
    scales_at_N,
    is_output_N,
    num_inner,
    group_size,
    BITS: tl.constexpr,
    IS_PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
):
    """Return ``x @ w^T`` of a tile, in fp32; whole steps, each within one group."""
    sum_MN = tl.zeros((M, N), dtype=tl.float32)
    for first in range(0, num_inner, P):
        x_MP = tl.load(x_at_MP)
        values_NB = tl.load(values_at_NB, mask=is_output_N[:, None], other=0)
        w_PN = tl.trans(widened(values_NB, BITS, x_MP.dtype))
        if IS_PER_ROW:
            sum_MN = add_product(sum_MN, x_MP, w_PN, PRECISION)
        else:
            scale_N = tl.load(scales_at_N + first // group_size, mask=is_output_N, other=0)
            part_MN = add_product(tl.zeros((M, N), dtype=tl.float32), x_MP, w_PN, PRECISION)
            sum_MN += part_MN * scale_N.to(tl.float32)[None, :]
        x_at_MP += P
        values_at_NB += P * BITS // 8
    if IS_PER_ROW:
        scale_N = tl.load(scales_at_N, mask=is_output_N, other=0)
        sum_MN *= scale_N.to(tl.float32)[None, :]
    return sum_MN


@triton.jit
def quantized_up_kernel(
    x_TD,
    order_R,
    tiles_L2,
    offsets_S1,
    values_SHB,
    scales_SHG,
    bias_SH,
    a_RF,
    num_tiles,
    num_choices,
    d_model,
    d_expert,
    group_size,
    stride_slot,
    stride_row,
    stride_scale_slot,
    stride_scale_row,
    stride_bias,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    IS_PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    num_columns = tl.cdiv(d_expert, N // 2)
    tile, column = tile_and_column(tl.program_id(0), num_tiles, num_columns, GROUP_TILES, False)
    slot = tl.load(tiles_L2 + 2 * tile).to(tl.int64)
    if slot < 0:
        return
    row_M = tl.load(tiles_L2 + 2 * tile + 1) + tl.arange(0, M)
    is_row_M = row_M < tl.load(offsets_S1 + slot + 1)
    # Rows behind the group's end read token 0 and are dropped at the store: no mask in the loop.
    token_M = tl.load(order_R + row_M, mask=is_row_M, other=0) // num_choices
    # Gate and up rows alternate, so that one product makes both and a thread holds the pair.
    output_N = tl.arange(0, N)
    feature_N = column * (N // 2) + output_N // 2
    line_N = feature_N + output_N % 2 * d_expert
    byte_B = tl.arange(0, P * BITS // 8)
    h_MN = quantized_product(
        x_TD + token_M.to(tl.int64)[:, None] * d_model + tl.arange(0, P)[None, :],
        values_SHB + slot * stride_slot + line_N[:, None] * stride_row + byte_B[None, :],
        scales_SHG + slot * stride_scale_slot + line_N * stride_scale_row,
        feature_N < d_expert,
        d_model,
        group_size,
        BITS,
        IS_PER_ROW,
        PRECISION,
        M,
        N,
        P,
    )
    gate, up = tl.split(tl.reshape(h_MN, (M, N // 2, 2)))
    feature = column * (N // 2) + tl.arange(0, N // 2)
    if bias_SH is not None:
        bias_at = bias_SH + slot * stride_bias + feature
        gate += tl.load(bias_at, mask=feature < d_expert, other=0).to(tl.float32)[None, :]
        bias_at += d_expert
        up += tl.load(bias_at, mask=feature < d_expert, other=0).to(tl.float32)[None, :]
    tl.store(
        a_RF + row_M.to(tl.int64)[:, None] * d_expert + feature[None, :],
        gated(gate, up, ACTIVATION).to(a_RF.dtype.element_ty),
        mask=is_row_M[:, None] & (feature < d_expert)[None, :],
    )


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
    # Rows behind the group's end read its last row and are dropped at the store.
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
