"""Products with weights in 8 or 4 bits (values/quantized_weights.py), widened inside the kernel.

A value is widened to x's type exactly, products are summed in fp32, and sums are multiplied by the
scale: once at the end if a row has one scale, else once per group. So nothing is rounded that plain
weights would not round. fc1 is quantized_up.py, fc2 is quantized_matmul.py.

In a tile: M rows, N outputs, P inputs at a time in B bytes.
"""

from typing import Any

import triton
import triton.language as tl

from ..values.few_bits import INT4_ZERO
from ..values.quantized_weights import QuantizedMatrices
from .tile_math import add_product
from .tiles import GROUP_TILES, Tiles

TWO_TO_23 = tl.constexpr(8388608.0)
"""From here to twice this, fp32 numbers are integers and their lowest bits count up."""
TWO_TO_23_BITS = tl.constexpr(0x4B000000)
ZERO_OF_INT4 = tl.constexpr(INT4_ZERO)


def constants(matrices: QuantizedMatrices, precision: str, tiles: Tiles) -> dict[str, Any]:
    """Return the compile-time arguments of both kernels."""
    assert matrices.group_size % tiles.P == 0, "a step must be within one group"
    return {
        "BITS": matrices.bits,
        "IS_PER_ROW": matrices.group_size == matrices.width,
        "PRECISION": precision,
        "M": tiles.M,
        "N": tiles.N,
        "P": tiles.P,
        "GROUP_TILES": GROUP_TILES,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@triton.jit
def widened(values_NB, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Return the values of some bytes in a type that holds them exactly, ``[N, P]``."""
    if BITS == 8:
        return values_NB.to(tl.float32).to(TYPE)
    else:
        # A nibble in the low bits of 2^23 gives 2^23 + nibble: two fast operations in place of a
        # conversion, which runs at a lower rate.
        word_NB = values_NB.to(tl.int32)
        low_NB = (word_NB & 15 | TWO_TO_23_BITS).to(tl.float32, bitcast=True)
        high_NB = (word_NB >> 4 | TWO_TO_23_BITS).to(tl.float32, bitcast=True)
        # Neighbouring values share a byte, so joining them moves no data between threads.
        pair_NB2 = tl.join(low_NB, high_NB) - (TWO_TO_23 + ZERO_OF_INT4)
        return tl.reshape(pair_NB2, (values_NB.shape[0], 2 * values_NB.shape[1])).to(TYPE)


@triton.jit
def quantized_product(
    x_at_MP,
    values_at_NB,
    scales_at_N,
    is_output_N,
    num_inner,
    group_size,
    BITS: tl.constexpr,
    IS_PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
):
    """Return ``x @ w^T`` of a tile, in fp32, in whole steps that are each within one group."""
    sum_MN = tl.zeros((M, N), dtype=tl.float32)
    for first in range(0, num_inner, P):
        x_MP = tl.load(x_at_MP)
        values_NB = tl.load(values_at_NB, mask=is_output_N[:, None], other=0)
        w_PN = tl.trans(widened(values_NB, BITS, x_MP.dtype))
        if IS_PER_ROW:
            sum_MN = add_product(sum_MN, x_MP, w_PN, PRECISION)
        else:
            scale_N = tl.load(scales_at_N + first // group_size, mask=is_output_N, other=0)
            part_MN = add_product(tl.zeros((M, N), dtype=tl.float32), x_MP, w_PN, PRECISION)
            sum_MN += part_MN * scale_N.to(tl.float32)[None, :]
        x_at_MP += P
        values_at_NB += P * BITS // 8
    if IS_PER_ROW:
        scale_N = tl.load(scales_at_N, mask=is_output_N, other=0)
        sum_MN *= scale_N.to(tl.float32)[None, :]
    return sum_MN
