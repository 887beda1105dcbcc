"""Matrix products whose rows do not depend on how many rows there are.

N rows, P inputs, Q outputs.

The C++ kernels (``kernels/cpu``) are like that for every number of rows. Where there are none: for
few rows BLAS libraries take other code with another order of summation. Measured on a CPU with
AVX512-BF16, rows of F.linear against those of a 400-row call: fp32 (MKL) differs below 12 rows,
bf16 (oneDNN) for a single row once P exceeds 1024, and for no other number of rows
(benchmarks/constants.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu.linear import linear as cpp_linear

MIN_ROWS_BF16 = 2
MIN_ROWS_FP32 = 16


def row_stable_linear(x_NP: Tensor, weight_QP: Tensor, min_rows: int) -> Tensor:
    """Return ``x @ weight.T`` for inference, on the CPU computed with ``min_rows`` or more rows."""
    num_rows = x_NP.shape[0]
    if not 0 < num_rows < min_rows or x_NP.is_cuda:
        return F.linear(x_NP, weight_QP)
    padded = x_NP.new_zeros(min_rows, x_NP.shape[1])
    padded[:num_rows] = x_NP
    return F.linear(padded, weight_QP)[:num_rows]


def bf16_row_stable_linear(x_NP: Tensor, weight_QP: Tensor) -> Tensor:
    """Return ``x @ weight.T``; in bf16 and without gradients, each row as in any larger batch."""
    if torch.is_grad_enabled():
        return F.linear(x_NP, weight_QP)
    y_NQ = cpp_linear(x_NP, weight_QP)
    if y_NQ is not None:
        return y_NQ
    if x_NP.dtype != torch.bfloat16:
        return F.linear(x_NP, weight_QP)
    return row_stable_linear(x_NP, weight_QP, MIN_ROWS_BF16)
