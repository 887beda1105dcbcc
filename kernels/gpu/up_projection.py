"""fc1 and the activation of every routed row, with biases: ``a = act(x W_gate) * (x W_up)``, or
``act(x W_up)`` without a gate.

T tokens, K choices, R routed rows in slot order, S slots, L tiles, D model width, F expert width,
H rows of fc1. In a tile: M rows, N columns of which N/2 are gates (if any), P of D at a time.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..values.activation import UNGATED, fc1_parts
from .grouping import SlotGroups
from .tile_math import add_product, columns_of, gated, has_gate, tile_and_column, ungated
from .tiles import GROUP_TILES, Tiles


def up_projection(
    x_TD: Tensor,
    groups: SlotGroups,
    fc1_SHD: Tensor,
    bias_SH: Tensor | None,
    activation: str,
    precision: str,
    tiles: Tiles,
    a_RF: Tensor | None,
    h_RH: Tensor | None,
) -> None:
    """Write the activations of rows that have a slot, and their pre-activations if asked for."""
    d_model, d_expert = x_TD.shape[1], fc1_SHD.shape[1] // len(fc1_parts(activation))
    num_tiles = groups.tiles_L2.shape[0]
    features = tiles.N if activation in UNGATED else tiles.N // 2
    up_projection_kernel[(num_tiles * triton.cdiv(d_expert, features),)](
        x_TD,
        groups.order_R,
        groups.tiles_L2,
        groups.offsets_S1,
        fc1_SHD,
        bias_SH,
        a_RF,
        h_RH,
        num_tiles,
        groups.order_R.shape[0] // x_TD.shape[0],
        d_model,
        d_expert,
        x_TD.stride(0),
        fc1_SHD.stride(0),
        fc1_SHD.stride(1),
        0 if bias_SH is None else bias_SH.stride(0),
        ACTIVATION=activation,
        IS_EVEN=d_model % tiles.P == 0,
        PRECISION=precision,
        M=tiles.M,
        N=tiles.N,
        P=tiles.P,
        GROUP_TILES=GROUP_TILES,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


@triton.jit
def up_projection_kernel(
    x_TD,
    order_R,
    tiles_L2,
    offsets_S1,
    fc1_SHD,
    bias_SH,
    a_RF,
    h_RH,
    num_tiles,
    num_choices,
    d_model,
    d_expert,
    stride_x,
    stride_slot,
    stride_row,
    stride_bias,
    ACTIVATION: tl.constexpr,
    IS_EVEN: tl.constexpr,
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
    slot = tl.load(tiles_L2 + 2 * tile)
    if slot < 0:
        return
    row_M = tl.load(tiles_L2 + 2 * tile + 1) + tl.arange(0, M)
    is_row_M = row_M < tl.load(offsets_S1 + slot + 1)
    # Rows after the group's end read token 0 and are masked in the store: no mask in the loop.
    token_M = tl.load(order_R + row_M, mask=is_row_M, other=0) // num_choices
    # Gate and up columns alternate, so that one product computes both and a thread holds the pair.
    column_N = tl.arange(0, N)
    feature_N = column * FEATURES + (column_N // 2 if GATED else column_N)
    is_feature_N = feature_N < d_expert
    line_N = feature_N + (column_N % 2 * d_expert if GATED else 0)
    inner_P = tl.arange(0, P)
    x_at = x_TD + token_M.to(tl.int64)[:, None] * stride_x + inner_P[None, :]
    w_at = fc1_SHD + slot.to(tl.int64) * stride_slot
    w_at = w_at + line_N[None, :] * stride_row + inner_P[:, None]
    h_MN = tl.zeros((M, N), dtype=tl.float32)
    if bias_SH is not None:
        # The sum starts with the bias: added after the loop, it would spill.
        bias_at = bias_SH + slot.to(tl.int64) * stride_bias + line_N
        h_MN += tl.load(bias_at, mask=is_feature_N, other=0).to(tl.float32)[None, :]
    for first in range(0, d_model, P):
        if IS_EVEN:
            x_MP = tl.load(x_at)
            w_PN = tl.load(w_at, mask=is_feature_N[None, :], other=0)
        else:
            is_inner_P = first + inner_P < d_model
            x_MP = tl.load(x_at, mask=is_inner_P[None, :], other=0)
            w_PN = tl.load(w_at, mask=is_feature_N[None, :] & is_inner_P[:, None], other=0)
        h_MN = add_product(h_MN, x_MP, w_PN, PRECISION)
        x_at += P
        w_at += P
    row_M = row_M.to(tl.int64)
    if GATED:
        feature = column * FEATURES + tl.arange(0, FEATURES)
        is_stored = is_row_M[:, None] & (feature < d_expert)[None, :]
        gate, up = tl.split(tl.reshape(h_MN, (M, N // 2, 2)))
        if a_RF is not None:
            tl.store(
                a_RF + row_M[:, None] * d_expert + feature[None, :],
                gated(gate, up, ACTIVATION).to(a_RF.dtype.element_ty),
                mask=is_stored,
            )
        if h_RH is not None:
            h_at = h_RH + row_M[:, None] * (2 * d_expert) + feature[None, :]
            tl.store(h_at, gate.to(h_RH.dtype.element_ty), mask=is_stored)
            tl.store(h_at + d_expert, up.to(h_RH.dtype.element_ty), mask=is_stored)
    else:
        # 32 columns at a time: the activations of a whole tile would spill, those of 64 with gelu.
        PARTS: tl.constexpr = N // 32
        for part in tl.static_range(PARTS):
            up = columns_of(h_MN, part, PARTS, M, N)
            feature = column * N + part * (N // PARTS) + tl.arange(0, N // PARTS)
            is_stored = is_row_M[:, None] & (feature < d_expert)[None, :]
            at = row_M[:, None] * d_expert + feature[None, :]
            if h_RH is not None:
                tl.store(h_RH + at, up.to(h_RH.dtype.element_ty), mask=is_stored)
            if a_RF is not None:
                act = ungated(up, ACTIVATION)
                tl.store(a_RF + at, act.to(a_RF.dtype.element_ty), mask=is_stored)
