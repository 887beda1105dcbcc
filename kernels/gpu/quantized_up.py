"""fc1 and the activation on weights in 8 or 4 bits; see quantized.py.

T tokens, R routed rows in slot order, S slots, L tiles, D model width, F expert width, H rows of
fc1, G groups of a row. In a tile: M rows, N/2 features with gate and up (N without a gate), P
inputs at a time in B bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..values.activation import UNGATED
from ..values.quantized_weights import QuantizedMatrices
from .grouping import SlotGroups
from .quantized import constants, quantized_product
from .tile_math import gated, has_gate, tile_and_column, ungated
from .tiles import Tiles


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
    """Write the activations of the rows that have a slot, with biases if any."""
    num_tiles, d_expert = groups.tiles_L2.shape[0], a_RF.shape[1]
    features = tiles.N if activation in UNGATED else tiles.N // 2
    quantized_up_kernel[(num_tiles * triton.cdiv(d_expert, features),)](
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
        **constants(fc1, precision, tiles),
    )


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
    GATED: tl.constexpr = has_gate(ACTIVATION)
    FEATURES: tl.constexpr = N // 2 if GATED else N
    num_columns = tl.cdiv(d_expert, FEATURES)
    tile, column = tile_and_column(tl.program_id(0), num_tiles, num_columns, GROUP_TILES, False)
    slot = tl.load(tiles_L2 + 2 * tile).to(tl.int64)
    if slot < 0:
        return
    row_M = tl.load(tiles_L2 + 2 * tile + 1) + tl.arange(0, M)
    is_row_M = row_M < tl.load(offsets_S1 + slot + 1)
    # Rows after the group's end read token 0 and are masked in the store: no mask in the loop.
    token_M = tl.load(order_R + row_M, mask=is_row_M, other=0) // num_choices
    # Gate and up rows alternate, so that one product computes both and a thread holds the pair.
    output_N = tl.arange(0, N)
    feature_N = column * FEATURES + (output_N // 2 if GATED else output_N)
    line_N = feature_N + (output_N % 2 * d_expert if GATED else 0)
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
    feature = column * FEATURES + tl.arange(0, FEATURES)
    if GATED:
        gate, up = tl.split(tl.reshape(h_MN, (M, N // 2, 2)))
        if bias_SH is not None:
            bias_at = bias_SH + slot * stride_bias + feature
            gate += tl.load(bias_at, mask=feature < d_expert, other=0).to(tl.float32)[None, :]
            bias_at += d_expert
            up += tl.load(bias_at, mask=feature < d_expert, other=0).to(tl.float32)[None, :]
        act = gated(gate, up, ACTIVATION)
    else:
        if bias_SH is not None:
            bias_at = bias_SH + slot * stride_bias + feature
            h_MN += tl.load(bias_at, mask=feature < d_expert, other=0).to(tl.float32)[None, :]
        act = ungated(h_MN, ACTIVATION)
    tl.store(
        a_RF + row_M.to(tl.int64)[:, None] * d_expert + feature[None, :],
        act.to(a_RF.dtype.element_ty),
        mask=is_row_M[:, None] & (feature < d_expert)[None, :],
    )
