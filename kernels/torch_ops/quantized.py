"""Products with matrices of few bits on torch's operators.

N rows, P inputs, Q outputs.
"""

import torch
from torch import Tensor

from ..values.few_bits import FewBitsMatrices
from ..values.quantized_weights import QuantizedMatrices
from .row_stable import bf16_row_stable_linear


def quantized_linear(x_NP: Tensor, matrices: FewBitsMatrices, slot: int) -> Tensor:
    """Return ``x w^T`` with a slot's matrix, ``[N, Q]``.

    In bf16 on a CPU, a row's bits do not depend on the other rows.
    """
    if x_NP.is_cpu and isinstance(matrices, QuantizedMatrices) and _has_row_scales(matrices):
        scales_Q = matrices.scales_SQG[slot, :, 0].to(x_NP.dtype)
        return torch._weight_int8pack_mm(x_NP, matrices.values[slot], scales_Q)
    return bf16_row_stable_linear(x_NP, matrices.dequantize(slot, x_NP.dtype))


def _has_row_scales(matrices: QuantizedMatrices) -> bool:
    return matrices.bits == 8 and matrices.scales_SQG.shape[2] == 1
