"""The Triton expert MLP on weights in 8 or 4 bits as a ``torch.library`` operator, for inference.

T tokens, K choices, R = T*K routed rows in slot order, E experts, S slots, D model width, F expert
width, H rows of fc1, Q outputs of a matrix, B bytes of a row, G groups of a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..values.quantized_weights import QuantizedMatrices
from .combine import combine
from .dequantize import dequantize
from .device import is_hopper, on_device_of
from .grouped_matmul import grouped_matmul
from .grouping import SlotGroups, group_rows
from .ops import PRECISION
from .quantized_matmul import quantized_matmul
from .quantized_up import quantized_up_projection
from .tiles import QUANTIZED_ROWS, is_dequantized, quantized_tiles, tile_rows, tiles_for
from .up_projection import up_projection


class _Product(NamedTuple):
    """One of an expert's two products, for all slots."""

    matrices: QuantizedMatrices
    bias_SQ: Tensor | None


@torch.library.custom_op("moeyard::quantized_expert_mlp", mutates_args=())
def quantized_expert_mlp_op(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    values1_SHB: Tensor,
    scales1_SHG: Tensor,
    values2_SDB: Tensor,
    scales2_SDG: Tensor,
    bias1_SH: Tensor | None,
    bias2_SD: Tensor | None,
    slot_of_E: Tensor | None,
    activation: str,
) -> Tensor:
    """Return y ``[T, D]``."""
    (num_tokens, d_model), num_rows = x_TD.shape, experts_TK.numel()
    if num_rows == 0:
        return x_TD.new_zeros(num_tokens, d_model)
    first = _Product(QuantizedMatrices(values1_SHB, scales1_SHG), bias1_SH)
    second = _Product(QuantizedMatrices(values2_SDB, scales2_SDG), bias2_SD)
    num_slots = values1_SHB.shape[0]
    num_experts = num_slots if slot_of_E is None else slot_of_E.numel()
    rows = tile_rows(num_rows, num_experts)
    matrix_bytes = values1_SHB.shape[1] * d_model * x_TD.element_size()
    with on_device_of(x_TD):
        if is_dequantized(num_rows, num_experts, matrix_bytes):
            expert_of_E = _experts_here(slot_of_E, num_slots)
            groups = group_rows(experts_TK, expert_of_E, num_experts, rows)
            y_RD = _dequantized_rows(x_TD, groups, first, second, slot_of_E, activation, rows)
        else:
            rows = min(rows, QUANTIZED_ROWS)
            groups = group_rows(experts_TK, slot_of_E, num_slots, rows)
            y_RD = _quantized_rows(x_TD, groups, first, second, activation, rows)
        return combine(y_RD, groups, weights_TK, num_tokens)


@quantized_expert_mlp_op.register_fake
def _(x_TD: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x_TD)


def _quantized_rows(
    x_TD: Tensor,
    groups: SlotGroups,
    first: _Product,
    second: _Product,
    activation: str,
    rows: int,
) -> Tensor:
    dtype, precision = x_TD.dtype, PRECISION[x_TD.dtype]
    a_RF = x_TD.new_empty(groups.order_R.numel(), second.matrices.width)
    tiles = quantized_tiles(rows, dtype, first.matrices.group_size)
    quantized_up_projection(x_TD, groups, *first, activation, precision, tiles, a_RF)
    tiles = quantized_tiles(rows, dtype, second.matrices.group_size)
    return quantized_matmul(a_RF, *second, groups, precision, tiles)


def _dequantized_rows(
    x_TD: Tensor,
    groups: SlotGroups,
    first: _Product,
    second: _Product,
    slot_of_E: Tensor | None,
    activation: str,
    rows: int,
) -> Tensor:
    """Dequantize one of the two matrices at a time, and multiply the rows."""
    dtype, precision = x_TD.dtype, PRECISION[x_TD.dtype]
    on_hopper = is_hopper(x_TD)
    a_RF = x_TD.new_empty(groups.order_R.numel(), second.matrices.width)
    tiles = tiles_for("up", rows, dtype, on_hopper)
    fc1_EHD = dequantize(first.matrices, slot_of_E, groups, dtype)
    bias1_EH = _by_expert(first.bias_SQ, slot_of_E)
    up_projection(x_TD, groups, fc1_EHD, bias1_EH, activation, precision, tiles, a_RF, None)
    del fc1_EHD
    tiles = tiles_for("matmul", rows, dtype, on_hopper)
    fc2_EFD = dequantize(second.matrices, slot_of_E, groups, dtype).transpose(1, 2)
    bias2_ED = _by_expert(second.bias_SQ, slot_of_E)
    return grouped_matmul(a_RF, fc2_EFD, bias2_ED, groups, precision, tiles)


def _by_expert(bias_SQ: Tensor | None, slot_of_E: Tensor | None) -> Tensor | None:
    """Return ``[E, Q]``; entries of experts that are not here are arbitrary and never read."""
    if bias_SQ is None or slot_of_E is None:
        return bias_SQ
    return bias_SQ[slot_of_E.long().clamp(0, len(bias_SQ) - 1)]


def _experts_here(slot_of_E: Tensor | None, num_slots: int) -> Tensor | None:
    """Return a table that maps each expert to itself, and experts that are not here to -1."""
    if slot_of_E is None:
        return None
    is_here_E = (slot_of_E >= 0) & (slot_of_E < num_slots)
    return torch.where(is_here_E, torch.arange(len(slot_of_E), device=slot_of_E.device), -1).int()
