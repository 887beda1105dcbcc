"""Convert weights of 8 or 4 bits to x's type, for the plain kernels.

The result is by expert, not by slot: a pool of slots may hold many more experts than this layer
has. Experts without rows are skipped.

E experts, S slots, Q outputs, P inputs and G groups of a matrix. In a tile: N rows, P inputs in B
bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..values.quantized_weights import QuantizedMatrices
from .grouping import SlotGroups
from .quantized import widened

LINES, INPUTS = 32, 128
"""A tile: at least 16 bytes a thread, for both reading and writing."""


def dequantize(
    matrices: QuantizedMatrices, slot_of_E: Tensor | None, groups: SlotGroups, dtype: torch.dtype
) -> Tensor:
    """Return ``[E, Q, P]``, each value rounded once; experts without rows are undefined.

    ``groups`` are by expert.
    """
    num_experts, num_lines = groups.offsets_S1.shape[0] - 1, matrices.values.shape[1]
    out_EQP = torch.empty(
        num_experts, num_lines, matrices.width, dtype=dtype, device=matrices.values.device
    )
    group_size = matrices.group_size
    step = min(INPUTS, group_size & -group_size)
    dequantize_kernel[(num_experts, triton.cdiv(num_lines, LINES))](
        matrices.values,
        matrices.scales_SQG,
        slot_of_E,
        groups.offsets_S1,
        out_EQP,
        num_lines,
        matrices.width,
        group_size,
        matrices.values.stride(0),
        matrices.values.stride(1),
        matrices.scales_SQG.stride(0),
        matrices.scales_SQG.stride(1),
        BITS=matrices.bits,
        N=LINES,
        P=step,
        num_warps=4,
    )
    return out_EQP


@triton.jit
def dequantize_kernel(
    values_SQB,
    scales_SQG,
    slot_of_E,
    offsets_E1,
    out_EQP,
    num_lines,
    num_inner,
    group_size,
    stride_slot,
    stride_row,
    stride_scale_slot,
    stride_scale_row,
    BITS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    if tl.load(offsets_E1 + expert) == tl.load(offsets_E1 + expert + 1):
        return
    slot = expert
    if slot_of_E is not None:
        slot = tl.load(slot_of_E + expert).to(tl.int64)
    line_N = tl.program_id(1) * N + tl.arange(0, N)
    is_line_N = line_N < num_lines
    values_at = values_SQB + slot * stride_slot + line_N[:, None] * stride_row
    values_at += tl.arange(0, P * BITS // 8)[None, :]
    scales_at = scales_SQG + slot * stride_scale_slot + line_N * stride_scale_row
    out_at = out_EQP + expert * num_lines * num_inner
    out_at += line_N[:, None] * num_inner + tl.arange(0, P)[None, :]
    for first in range(0, num_inner, P):
        values_NB = tl.load(values_at, mask=is_line_N[:, None], other=0)
        scale_N = tl.load(scales_at + first // group_size, mask=is_line_N, other=0)
        w_NP = widened(values_NB, BITS, tl.float32) * scale_N.to(tl.float32)[:, None]
        tl.store(out_at, w_NP.to(out_EQP.dtype.element_ty), mask=is_line_N[:, None])
        values_at += P * BITS // 8
        out_at += P
