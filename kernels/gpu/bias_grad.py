"""Gradients of the experts' biases: for each slot, a weighted sum of the rows of its group.

T tokens, K choices, R = T*K routed rows in slot order, S slots, Q entries of one slot's bias. In a
tile: I rows and C entries at a time.
"""

import triton
import triton.language as tl
from torch import Tensor

from .grouping import SlotGroups

ROWS, COLUMNS = 32, 128
"""A tile: at least 16 bytes a thread in every type. Nothing is multiplied here, so the kernel is as
fast as it reads each row once."""


def bias_grad(
    rows_XQ: Tensor,
    groups: SlotGroups,
    weights_TK: Tensor | None,
    out_SQ: Tensor,
    add: bool,
) -> None:
    """Write each slot's sum to ``out_SQ``, or ``add`` it, in row order and in fp32.

    ``rows_XQ`` has a line per row in slot order. With ``weights_TK`` it has a line per token, and
    each routed row is multiplied by its weight.
    """
    num_slots, num_columns = out_SQ.shape
    bias_grad_kernel[(num_slots, triton.cdiv(num_columns, COLUMNS))](
        rows_XQ,
        groups.order_R,
        groups.offsets_S1,
        weights_TK,
        out_SQ,
        1 if weights_TK is None else weights_TK.shape[1],
        num_columns,
        rows_XQ.stride(0),
        out_SQ.stride(0),
        ADD=add,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )


@triton.jit
def bias_grad_kernel(
    rows_XQ,
    order_R,
    offsets_S1,
    weights_R,
    out_SQ,
    num_choices,
    num_columns,
    stride_row,
    stride_slot,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slot = tl.program_id(0)
    start, end = tl.load(offsets_S1 + slot), tl.load(offsets_S1 + slot + 1)
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column_C = column_C < num_columns
    out_at = out_SQ + slot.to(tl.int64) * stride_slot + column_C
    sum_C = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(start, end, ROWS):
        line_I = first + tl.arange(0, ROWS)
        is_row_I = line_I < end
        if weights_R is not None:
            routed_I = tl.load(order_R + line_I, mask=is_row_I, other=0)
            weight_I = tl.load(weights_R + routed_I, mask=is_row_I, other=0).to(tl.float32)
            line_I = routed_I // num_choices
        row_IC = tl.load(
            rows_XQ + line_I.to(tl.int64)[:, None] * stride_row + column_C[None, :],
            mask=is_row_I[:, None] & is_column_C[None, :],
            other=0,
        ).to(tl.float32)
        if weights_R is not None:
            row_IC *= weight_I[:, None]
        sum_C += tl.sum(row_IC, axis=0)
    if ADD:
        sum_C += tl.load(out_at, mask=is_column_C, other=0).to(tl.float32)
    tl.store(out_at, sum_C.to(out_SQ.dtype.element_ty), mask=is_column_C)
