"""Sort routed rows by slot on the GPU and cut the groups into tiles, without host synchronisation.

Every size is bounded from T, K and S, so nothing waits for the device and a CUDA graph may capture
the calls. No atomics: the order is stable and the same in every run.

T tokens, K choices, R = T*K routed rows, E experts, S slots, B blocks of rows, L tiles at most.
Inside kernels: I, J rows of a block, C blocks at a time, N slots at a time.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_few import FEW_ROWS, FEW_WARPS, group_few_kernel, slot_of_row

BLOCK_ROWS = 128
"""Rows that one program ranks among each other: 128 x 128 comparisons."""
RANK_WARPS = 8
"""64 comparisons a thread; with 4 warps the kernel spills on sm_80."""
SCAN_BLOCKS, SCAN_SLOTS = 64, 32
"""The scan's tile: 32 slots are one 128-byte line of counts."""


class SlotGroups(NamedTuple):
    """Routed rows in slot order; all int32. Rows without an expert here come last."""

    order_R: Tensor
    """Routed rows sorted by slot, stably."""
    inverse_R: Tensor
    """The position of each routed row in ``order_R``."""
    offsets_S1: Tensor
    """``[S + 1]``: slot s owns ``order_R[offsets[s] : offsets[s + 1]]``."""
    tiles_L2: Tensor
    """``[L, 2]``: slot and first row of each tile; slot -1 after the last tile."""


def max_tiles(num_rows: int, num_slots: int, tile_rows: int) -> int:
    """Return the largest number of tiles that any distribution of the rows can need."""
    if num_rows <= num_slots:
        return num_rows
    return num_slots + (num_rows - num_slots) // tile_rows


def group_rows(
    experts_TK: Tensor,
    slot_of_E: Tensor | None,
    num_slots: int,
    tile_rows: int,
    most_rows: int | None = None,
) -> SlotGroups:
    """Group the rows of ``experts_TK`` (int32 or int64) by the slot of their expert.

    ``slot_of_E`` (int32) gives each expert's slot, -1 where it is not here; None means slot e holds
    expert e. Ids outside ``[0, E)`` and experts without a slot are rows without an expert. Tiles
    never span two slots. At most ``most_rows`` rows have a slot (None = all).
    """
    num_rows = experts_TK.numel()
    num_tiles = max_tiles(num_rows if most_rows is None else most_rows, num_slots, tile_rows)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=experts_TK.device)
    zeros = functools.partial(torch.zeros, dtype=torch.int32, device=experts_TK.device)
    groups = SlotGroups(
        empty(num_rows),
        empty(num_rows),
        zeros(num_slots + 1) if num_rows == 0 else empty(num_slots + 1),
        empty(num_tiles, 2),
    )
    if num_rows == 0:
        return groups
    ids_R = experts_TK.reshape(-1)
    num_experts = num_slots if slot_of_E is None else slot_of_E.numel()
    if num_rows <= FEW_ROWS:
        sizes = (num_rows, num_experts, num_slots, num_tiles, tile_rows, FEW_ROWS)
        group_few_kernel[(1,)](ids_R, slot_of_E, *groups, *sizes, num_warps=FEW_WARPS)
        return groups
    num_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    slot_R, rank_R = empty(num_rows), empty(num_rows)
    before_BS1 = zeros(num_blocks, num_slots + 1)
    count_S1 = empty(num_slots + 1)
    rank_kernel[(num_blocks,)](
        ids_R,
        slot_of_E,
        slot_R,
        rank_R,
        before_BS1,
        num_rows,
        num_experts,
        num_slots,
        BLOCK_ROWS,
        num_warps=RANK_WARPS,
    )
    scan_kernel[(triton.cdiv(num_slots + 1, SCAN_SLOTS),)](
        before_BS1, count_S1, num_blocks, num_slots, SCAN_BLOCKS, SCAN_SLOTS
    )
    schedule_kernel[(num_slots + 1,)](
        count_S1,
        groups.offsets_S1,
        groups.tiles_L2,
        num_tiles,
        num_slots,
        tile_rows,
        triton.next_power_of_2(num_slots),
    )
    permute_kernel[(num_blocks,)](
        slot_R,
        rank_R,
        before_BS1,
        groups.offsets_S1,
        groups.order_R,
        groups.inverse_R,
        num_rows,
        num_slots,
        BLOCK_ROWS,
    )
    return groups


@triton.jit
def rank_kernel(
    ids_R,
    slot_of_E,
    slot_R,
    rank_R,
    before_BS1,
    num_rows,
    num_experts,
    num_slots,
    BLOCK_ROWS: tl.constexpr,
):
    """Write each row's slot, its rank among the block's rows of that slot, and block counts."""
    block = tl.program_id(0)
    lane_I = tl.arange(0, BLOCK_ROWS)
    row_I = block * BLOCK_ROWS + lane_I
    is_row_I = row_I < num_rows
    # Lanes after the last row count as rows without an expert. They are the last lanes of the last
    # block, so they change no row's rank, and the count of rows without an expert is never read.
    slot_I = slot_of_row(ids_R, slot_of_E, row_I, num_rows, num_experts, num_slots)
    is_same_IJ = slot_I[:, None] == slot_I[None, :]
    is_earlier_IJ = lane_I[None, :] < lane_I[:, None]
    rank_I = tl.sum((is_same_IJ & is_earlier_IJ).to(tl.int32), axis=1)
    count_I = tl.sum(is_same_IJ.to(tl.int32), axis=1)
    tl.store(slot_R + row_I, slot_I, mask=is_row_I)
    tl.store(rank_R + row_I, rank_I, mask=is_row_I)
    # The last lane of each slot writes the count; the other counts are zero already.
    line = before_BS1 + block.to(tl.int64) * (num_slots + 1)
    tl.store(line + slot_I, count_I, mask=rank_I == count_I - 1)


@triton.jit
def scan_kernel(
    before_BS1,
    count_S1,
    num_blocks,
    num_slots,
    SCAN_BLOCKS: tl.constexpr,
    SCAN_SLOTS: tl.constexpr,
):
    """Turn each block's counts into those of all blocks before it; write the totals."""
    slot_N = tl.program_id(0) * SCAN_SLOTS + tl.arange(0, SCAN_SLOTS)
    total_N = tl.zeros((SCAN_SLOTS,), dtype=tl.int32)
    for first in range(0, num_blocks, SCAN_BLOCKS):
        block_C = first + tl.arange(0, SCAN_BLOCKS)
        is_count_CN = (block_C < num_blocks)[:, None] & (slot_N <= num_slots)[None, :]
        at_CN = before_BS1 + block_C[:, None].to(tl.int64) * (num_slots + 1) + slot_N[None, :]
        count_CN = tl.load(at_CN, mask=is_count_CN, other=0)
        before_CN = total_N[None, :] + tl.cumsum(count_CN, axis=0) - count_CN
        tl.store(at_CN, before_CN, mask=is_count_CN)
        total_N += tl.sum(count_CN, axis=0)
    tl.store(count_S1 + slot_N, total_N, mask=slot_N <= num_slots)


@triton.jit
def schedule_kernel(
    count_S1,
    offsets_S1,
    tiles_L2,
    num_tiles,
    num_slots,
    tile_rows,
    ALL_SLOTS: tl.constexpr,
):
    """Write a slot's offset and tiles; program S closes both lists."""
    slot = tl.program_id(0)
    other_N = tl.arange(0, ALL_SLOTS)
    count_N = tl.load(count_S1 + other_N, mask=other_N < tl.minimum(slot, num_slots), other=0)
    first_row = tl.sum(count_N)
    first_tile = tl.sum((count_N + tile_rows - 1) // tile_rows)
    tl.store(offsets_S1 + slot, first_row)
    tiles_here = (tl.load(count_S1 + slot) + tile_rows - 1) // tile_rows
    if slot == num_slots:
        tiles_here = num_tiles - first_tile
    for start in range(0, tiles_here, 128):
        tile_N = start + tl.arange(0, 128)
        at_N = tiles_L2 + 2 * (first_tile + tile_N)
        tl.store(at_N, tl.where(slot == num_slots, -1, slot), mask=tile_N < tiles_here)
        tl.store(at_N + 1, first_row + tile_N * tile_rows, mask=tile_N < tiles_here)


@triton.jit
def permute_kernel(
    slot_R,
    rank_R,
    before_BS1,
    offsets_S1,
    order_R,
    inverse_R,
    num_rows,
    num_slots,
    BLOCK_ROWS: tl.constexpr,
):
    """Write each row's position, and the row at each position."""
    block = tl.program_id(0)
    row_I = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row_I = row_I < num_rows
    slot_I = tl.load(slot_R + row_I, mask=is_row_I, other=0)
    line = before_BS1 + block.to(tl.int64) * (num_slots + 1)
    place_I = tl.load(rank_R + row_I, mask=is_row_I, other=0)
    place_I += tl.load(line + slot_I, mask=is_row_I, other=0)
    place_I += tl.load(offsets_S1 + slot_I, mask=is_row_I, other=0)
    tl.store(inverse_R + row_I, place_I, mask=is_row_I)
    tl.store(order_R + place_I, row_I, mask=is_row_I)
