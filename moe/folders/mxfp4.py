"""Decode MXFP4, the 4-bit floating-point blocks that gpt-oss keeps its experts in.

32 inputs share a power of two (OCP Microscaling Formats 1.0: E2M1 values, an E8M0 scale). A matrix
is two tensors, ``*_blocks`` and ``*_scales``; bf16 holds every value exactly.

Q outputs and P inputs of a matrix, G = P / 32 groups, B = 16 bytes of a group.
"""

from functools import cache

import torch
from torch import Tensor

GROUP_SIZE = 32
GROUP_BYTES = GROUP_SIZE // 2

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the low three bits; the fourth bit is the sign."""


def decode(blocks_QGB: Tensor, scales_QG: Tensor, out_QP: Tensor) -> None:
    """Fill ``out_QP``, of any floating-point type, with a matrix; rows may have any stride.

    ``blocks_QGB`` is uint8 ``[Q, G, 16]``, inputs 2i in the low half of byte i and 2i + 1 in the
    high half; ``scales_QG`` is uint8, the exponent of two plus 127, where 255 stands for NaN.
    """
    rows, num_groups, _ = blocks_QGB.shape
    assert blocks_QGB.shape[2] == GROUP_BYTES and scales_QG.shape == (rows, num_groups)
    assert blocks_QGB.dtype == scales_QG.dtype == torch.uint8
    words = blocks_QGB.view(torch.uint16).int().reshape(-1)
    values_QGP = _four_values_of_16_bits().index_select(0, words).view(torch.bfloat16)
    powers_QG1 = _powers().index_select(0, scales_QG.int().reshape(-1)).view(rows, num_groups, 1)
    values_QGP = values_QGP.view(rows, num_groups, GROUP_SIZE).mul_(powers_QG1)
    out_QP.copy_(values_QGP.flatten(-2))


@cache
def _four_values_of_16_bits() -> Tensor:
    """Return four bf16 values as an int64 for every two bytes of a block.

    On an AVX-512 CPU one look-up of four values took a fifth of the time of two look-ups of two.
    """
    table_16 = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.bfloat16)
    words = torch.arange(1 << 16)
    halves = [words >> shift & 15 for shift in (0, 4, 8, 12)]
    return table_16[torch.stack(halves, dim=-1)].view(torch.int64).squeeze(-1)


@cache
def _powers() -> Tensor:
    powers = [2.0 ** (byte - 127) for byte in range(255)]
    return torch.tensor([*powers, torch.nan], dtype=torch.bfloat16)
