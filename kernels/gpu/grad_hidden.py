"""The gradients of fc1's output and of the routing weights, from the gradient of the output.

With G = grad_y W2 of a row (not yet weighted), A its activation and s its routing weight:
grad s = <G, A>, plus <grad_y, b2> if fc2 has a bias, because <grad_y, A W2^T> = <grad_y W2, A>, so
the outputs need not be kept; grad A = s G; and fc2's weight gradient needs s A. All but the part of
the bias come from one tile of G (the identities are SonicMoE's).

T tokens, K choices, R routed rows in slot order, S slots, L tiles, D model width, F expert width,
H rows of fc1, B column tiles. In a tile: M rows, N of F, P of D at a time. Tensors of values per
row may end after the last row that has a slot.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouping import SlotGroups
from .tile_math import (
    add_product,
    columns_of,
    gated_with_slopes,
    has_gate,
    tile_and_column,
    ungated_with_slope,
)
from .tiles import GROUP_TILES, Tiles


def grad_hidden(
    grad_TD: Tensor,
    groups: SlotGroups,
    weights_TK: Tensor,
    h_RH: Tensor,
    fc2_SDF: Tensor,
    bias_SD: Tensor | None,
    activation: str,
    precision: str,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad h ``[R, H]``, the weighted activations ``[R, F]`` and grad weights ``[T, K]``.

    Rows without a slot are undefined in the first two and zero in the last.
    """
    num_rows, d_model, d_expert = h_RH.shape[0], fc2_SDF.shape[1], fc2_SDF.shape[2]
    num_tiles = groups.tiles_L2.shape[0]
    num_columns = triton.cdiv(d_expert, tiles.N)
    grad_h_RH = torch.empty_like(h_RH)
    scaled_RF = h_RH.new_empty(num_rows, d_expert)
    part_BR = h_RH.new_empty(num_columns, num_rows, dtype=torch.float32)
    grad_hidden_kernel[(num_tiles * num_columns,)](
        grad_TD,
        groups.order_R,
        groups.tiles_L2,
        groups.offsets_S1,
        weights_TK,
        h_RH,
        fc2_SDF,
        grad_h_RH,
        scaled_RF,
        part_BR,
        num_tiles,
        num_rows,
        weights_TK.shape[1],
        d_model,
        d_expert,
        fc2_SDF.stride(0),
        fc2_SDF.stride(1),
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
    is_present_R = groups.inverse_R < groups.offsets_S1[-1]
    line_R = groups.inverse_R.long().clamp(max=num_rows - 1)
    grad_weights_R = torch.where(is_present_R, part_BR.sum(0)[line_R], 0)
    grad_weights_TK = grad_weights_R.view_as(weights_TK)
    if bias_SD is not None:
        is_present_TK = is_present_R.view_as(weights_TK)
        grad_weights_TK += torch.where(is_present_TK, _through_bias(grad_TD, groups, bias_SD), 0)
    return grad_h_RH, scaled_RF, grad_weights_TK.to(weights_TK.dtype)


def _through_bias(grad_TD: Tensor, groups: SlotGroups, bias_SD: Tensor) -> Tensor:
    """Return <grad_y, b2> for every routed row, ``[T, K]``; undefined without a slot.

    One product with all slots' biases, from which each row takes its slot's entry. It costs 2 T D S
    operations, under 1 % of the experts' at gpt-oss's widths, and no kernel gathers rows again.
    """
    slot_R = torch.searchsorted(groups.offsets_S1[1:], groups.inverse_R, right=True)
    slot_TK = slot_R.clamp(max=len(bias_SD) - 1).view(grad_TD.shape[0], -1)
    return (grad_TD @ bias_SD.T).float().gather(1, slot_TK)


@triton.jit
def _finish_columns(
    g_MN,
    feature_N,
    row_M,
    is_row_M,
    weight_M,
    h_RH,
    grad_h_RH,
    scaled_RF,
    d_expert,
    ACTIVATION: tl.constexpr,
):
    """Write grad h and the weighted activation of some columns; return their part of grad s."""
    is_stored_MN = is_row_M[:, None] & (feature_N < d_expert)[None, :]
    grad_a_MN = g_MN * weight_M[:, None]
    type_h: tl.constexpr = grad_h_RH.dtype.element_ty
    if has_gate(ACTIVATION):
        at_MN = row_M[:, None] * (2 * d_expert) + feature_N[None, :]
        gate_MN = tl.load(h_RH + at_MN, mask=is_stored_MN, other=0).to(tl.float32)
        up_MN = tl.load(h_RH + at_MN + d_expert, mask=is_stored_MN, other=0).to(tl.float32)
        a_MN, gate_slope_MN, up_slope_MN = gated_with_slopes(gate_MN, up_MN, ACTIVATION)
        grad_up_MN = (grad_a_MN * up_slope_MN).to(type_h)
        tl.store(grad_h_RH + at_MN, (grad_a_MN * gate_slope_MN).to(type_h), mask=is_stored_MN)
        tl.store(grad_h_RH + at_MN + d_expert, grad_up_MN, mask=is_stored_MN)
    else:
        at_MN = row_M[:, None] * d_expert + feature_N[None, :]
        h_MN = tl.load(h_RH + at_MN, mask=is_stored_MN, other=0).to(tl.float32)
        a_MN, slope_MN = ungated_with_slope(h_MN, ACTIVATION)
        tl.store(grad_h_RH + at_MN, (grad_a_MN * slope_MN).to(type_h), mask=is_stored_MN)
    scaled_at = scaled_RF + row_M[:, None] * d_expert + feature_N[None, :]
    tl.store(scaled_at, (a_MN * weight_M[:, None]).to(type_h), mask=is_stored_MN)
    return tl.sum(g_MN * a_MN, axis=1)


@triton.jit
def grad_hidden_kernel(
    grad_TD,
    order_R,
    tiles_L2,
    offsets_S1,
    weights_R,
    h_RH,
    fc2_SDF,
    grad_h_RH,
    scaled_RF,
    part_BR,
    num_tiles,
    num_rows,
    num_choices,
    d_model,
    d_expert,
    stride_slot,
    stride_row,
    ACTIVATION: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    num_columns = tl.cdiv(d_expert, N)
    tile, column = tile_and_column(tl.program_id(0), num_tiles, num_columns, GROUP_TILES, False)
    slot = tl.load(tiles_L2 + 2 * tile)
    if slot < 0:
        return
    row_M = tl.load(tiles_L2 + 2 * tile + 1) + tl.arange(0, M)
    is_row_M = row_M < tl.load(offsets_S1 + slot + 1)
    routed_M = tl.load(order_R + row_M, mask=is_row_M, other=0)
    feature_N = column * N + tl.arange(0, N)
    is_feature_N = feature_N < d_expert
    inner_P = tl.arange(0, P)
    token_M = (routed_M // num_choices).to(tl.int64)
    grad_at = grad_TD + token_M[:, None] * d_model + inner_P[None, :]
    w_at = fc2_SDF + slot.to(tl.int64) * stride_slot
    w_at = w_at + inner_P[:, None] * stride_row + feature_N[None, :]
    g_MN = tl.zeros((M, N), dtype=tl.float32)
    for first in range(0, d_model, P):
        if IS_EVEN:
            grad_MP = tl.load(grad_at)
            w_PN = tl.load(w_at, mask=is_feature_N[None, :], other=0)
        else:
            is_inner_P = first + inner_P < d_model
            grad_MP = tl.load(grad_at, mask=is_inner_P[None, :], other=0)
            w_PN = tl.load(w_at, mask=is_inner_P[:, None] & is_feature_N[None, :], other=0)
        g_MN = add_product(g_MN, grad_MP, w_PN, PRECISION)
        grad_at += P
        w_at += P * stride_row
    weight_M = tl.load(weights_R + routed_M, mask=is_row_M, other=0).to(tl.float32)
    row_M = row_M.to(tl.int64)
    # A quarter of the columns at a time: gate, up and their gradients of a whole tile would spill,
    # and an eighth writes rows that are too short for fast stores (1.2 times slower).
    PARTS: tl.constexpr = 4
    part_M = tl.zeros((M,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        part_M += _finish_columns(
            columns_of(g_MN, part, PARTS, M, N),
            column * N + part * (N // PARTS) + tl.arange(0, N // PARTS),
            row_M,
            is_row_M,
            weight_M,
            h_RH,
            grad_h_RH,
            scaled_RF,
            d_expert,
            ACTIVATION,
        )
    tl.store(part_BR + column.to(tl.int64) * num_rows + row_M, part_M, mask=is_row_M)
