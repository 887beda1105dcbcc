"""Add up the rows of each token in the order of its choices: no atomics, the same bits every time.

T tokens, K choices, R = T*K routed rows in slot order, S slots, D model width; C columns at a time.
Tensors of values per row may end after the last row that has a slot.
"""

import triton
import triton.language as tl
from torch import Tensor

from .grouping import SlotGroups


def combine(y_RD: Tensor, groups: SlotGroups, weights_TK: Tensor | None, num_tokens: int) -> Tensor:
    """Return ``sum_k weights[t, k] * y_row(t, k)``, ``[T, D]``, summed in fp32.

    Rows without a slot add nothing, even if their lines or weights are NaN. ``weights_TK = None``
    sums the rows unweighted.
    """
    d_model = y_RD.shape[1]
    out_TD = y_RD.new_empty(num_tokens, d_model)
    columns = min(1024, triton.next_power_of_2(d_model))
    combine_kernel[(num_tokens, triton.cdiv(d_model, columns))](
        y_RD,
        groups.inverse_R,
        groups.offsets_S1,
        weights_TK,
        out_TD,
        groups.inverse_R.shape[0] // num_tokens,
        groups.offsets_S1.shape[0] - 1,
        d_model,
        COLUMNS=columns,
        num_warps=4,
    )
    return out_TD


@triton.jit
def combine_kernel(
    y_RD,
    inverse_R,
    offsets_S1,
    weights_R,
    out_TD,
    num_choices,
    num_slots,
    d_model,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column_C = column_C < d_model
    num_present = tl.load(offsets_S1 + num_slots)
    sum_C = tl.zeros((COLUMNS,), dtype=tl.float32)
    for choice in range(num_choices):
        row = token * num_choices + choice
        place = tl.load(inverse_R + row)
        is_present = place < num_present
        y_at = y_RD + place.to(tl.int64) * d_model + column_C
        y_C = tl.load(y_at, mask=is_present & is_column_C, other=0).to(tl.float32)
        if weights_R is not None:
            y_C *= tl.load(weights_R + row, mask=is_present, other=0).to(tl.float32)
        sum_C += y_C
    out_at = out_TD + token * d_model + column_C
    tl.store(out_at, sum_C.to(out_TD.dtype.element_ty), mask=is_column_C)
