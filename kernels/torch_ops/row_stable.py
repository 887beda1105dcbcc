"""Matrix products whose rows do not depend on how many rows there are.

N rows, P inputs, Q outputs.

BLAS libraries choose their code, and with it the order of summation, by the size of a product and
by the processor. We compared rows of F.linear with those of a 400-row call. On an AMD EPYC with
AVX512-BF16, fp32 differs below 12 rows, and bf16 for a single row. On an Intel Xeon with AMX and
two threads, both differ for most numbers of rows up to 130 and beyond. On both, products of one
size agree with each other, so rows are multiplied in blocks of one size (benchmarks/constants.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 16
"""Rows of a product: few, because decoding has few rows, but a whole tile of matrix units."""


def row_stable_linear(x_NP: Tensor, weight_QP: Tensor) -> Tensor:
    """Return ``x @ weight.T`` for inference; on the CPU in blocks of ``BLOCK_ROWS`` rows."""
    if x_NP.is_cuda:
        return F.linear(x_NP, weight_QP)
    num_rows = x_NP.shape[0]
    rows = -num_rows % BLOCK_ROWS
    padded_NP = F.pad(x_NP, (0, 0, 0, rows)) if rows else x_NP
    blocks = [F.linear(block_NP, weight_QP) for block_NP in padded_NP.split(BLOCK_ROWS)]
    return torch.cat(blocks)[:num_rows]


def bf16_row_stable_linear(x_NP: Tensor, weight_QP: Tensor) -> Tensor:
    """Return ``x @ weight.T``; in bf16 without gradients, rows do not depend on the batch size."""
    if torch.is_grad_enabled() or x_NP.dtype != torch.bfloat16:
        return F.linear(x_NP, weight_QP)
    return row_stable_linear(x_NP, weight_QP)
