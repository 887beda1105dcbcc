"""The tiles of each kernel: for Hopper and bf16, the fastest of benchmarks/tiles.py on an H100.

Other constants come from the sources that are named next to them.

R routed rows, E experts; M rows of a tile, N columns of a tile, P the inner dimension.
"""

from typing import Literal, NamedTuple

import torch

Kernel = Literal["up", "matmul", "grad_hidden", "weight_grad", "weight_sum"]
"""The last two compute weight gradients: "weight_sum" adds them to existing sums."""


class Tiles(NamedTuple):
    """The shape of a kernel's tiles and how a program runs them."""

    M: int
    N: int
    P: int
    num_warps: int
    num_stages: int


GROUP_TILES = 8
"""Row tiles that share weights in L2: the value of Triton's matmul tutorial and of SonicMoE."""

WIDE_ROWS_PER_EXPERT = 64
"""From this many rows per expert on, 128-row tiles are worth their padding: vLLM's tuned tables for
the H200 (E=128 N=768 and E=8 N=14336) change there."""


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Return M of the kernels that walk row tiles.

    Below WIDE_ROWS_PER_EXPERT reading the weights sets the speed, so a tile should hold all rows of
    an expert: twice the mean, as in vLLM's tables. The number of slots has no influence, so that a
    cache of experts gives the same bits as the resident model.
    """
    mean = num_rows / max(1, num_experts)
    if mean > WIDE_ROWS_PER_EXPERT:
        return 128
    return next(rows for rows in (16, 32, 64, 128) if rows >= min(2 * mean, 64))


def tiles_for(kernel: Kernel, rows: int, dtype: torch.dtype, is_hopper: bool) -> Tiles:
    """Return the tiles of ``kernel``; ``rows`` is :func:`tile_rows` and fixes M.

    Weight gradients have no row tiles: their M and N are the gradient's rows and columns, P the
    routed rows taken at a time. Registers and shared memory of all of them:
    benchmarks/results/triton_registers.txt.
    """
    is_weight = kernel in ("weight_grad", "weight_sum")
    if dtype == torch.float32:
        return _FP32_WEIGHT_GRAD if is_weight else _FP32[rows]
    if is_weight:
        # Row numbers must be loaded before the rows, which takes every other stage.
        if not is_hopper:
            return Tiles(128, 128, 32, 8, 7)
        return Tiles(128, 256 if kernel == "weight_sum" else 128, 64, 8, 5)
    if rows < 128:
        # 128 of the inner dimension at a time would spill with the epilogue of grad_hidden.
        return _FEW_ROWS[rows]._replace(P=64) if kernel == "grad_hidden" else _FEW_ROWS[rows]
    return Tiles(128, 256, 64, 8, 4) if is_hopper else Tiles(128, 128, 64, 8, 3)


QUANTIZED_ROWS = 64
"""The most rows of a tile on weights in 8 or 4 bits. A scale per group costs a second sum in
registers, which 128 rows have no room for; sm_90 spills."""

DEQUANTIZE_ROWS_PER_EXPERT = 256
"""From this many rows per expert on, weights in 8 or 4 bits are converted to x's type once, and the
plain kernels run. An estimate, not measured yet: a tile widens its weights in about the time it
multiplies them, and writing and reading converted weights takes as long as multiplying 256 to 512
rows at the H200's rates."""
DEQUANTIZED_BYTES = 4 << 30
"""The largest fc1 of a layer that is converted: a GPU that needs 4-bit experts may have no room for
a layer of them in 16 bits. A guess at the memory that is free next to a model."""


def is_dequantized(num_rows: int, num_experts: int, matrix_bytes: int) -> bool:
    """Say whether weights in 8 or 4 bits are converted to x's type; fc1 then has ``matrix_bytes``.

    As with tiles, the number of slots has no influence.
    """
    is_small = num_experts * matrix_bytes <= DEQUANTIZED_BYTES
    return is_small and num_rows >= DEQUANTIZE_ROWS_PER_EXPERT * num_experts


def quantized_tiles(rows: int, dtype: torch.dtype, group_size: int) -> Tiles:
    """Return the tiles of products with weights in 8 or 4 bits; a step is within one group."""
    tiles = (_QUANTIZED_FP32 if dtype == torch.float32 else _QUANTIZED)[min(rows, QUANTIZED_ROWS)]
    step = min(tiles.P, group_size & -group_size)  # the largest power of 2 that divides a group
    # Short steps have few bytes in flight, so more stages are needed.
    return tiles._replace(P=step, num_stages=tiles.num_stages * (2 if 2 * step <= tiles.P else 1))


_QUANTIZED = {
    16: Tiles(16, 128, 256, 4, 2),
    32: Tiles(32, 128, 64, 4, 4),
    64: Tiles(64, 128, 64, 8, 3),
}
_QUANTIZED_FP32 = {
    16: Tiles(16, 64, 32, 4, 3),
    32: Tiles(32, 64, 32, 4, 3),
    64: Tiles(64, 32, 32, 4, 3),
}
"""The tiles of 16-bit and fp32 weights until measured; with shorter steps, more warps or fewer
columns where those would spill."""

_FEW_ROWS = {
    16: Tiles(16, 128, 128, 4, 3),
    32: Tiles(32, 128, 128, 4, 3),
    64: Tiles(64, 128, 64, 4, 3),
}
"""16-bit tiles where reading the weights sets the speed; vLLM's tables for the H200."""

_FP32 = {
    16: Tiles(16, 64, 32, 4, 3),
    32: Tiles(32, 64, 32, 4, 3),
    64: Tiles(64, 64, 32, 4, 3),
    128: Tiles(128, 64, 32, 8, 3),
}
_FP32_WEIGHT_GRAD = Tiles(64, 64, 32, 8, 5)
"""Three TF32 products per fp32 product need room for the split factors; small until measured."""
