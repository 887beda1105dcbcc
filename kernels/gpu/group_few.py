"""Grouping for decoding: so few rows that one program compares them all, in one launch.

R routed rows, S slots, L tiles at most. In the kernel: I, J rows, N slots at a time.
"""

import triton
import triton.language as tl

FEW_ROWS = 128
"""Rows that one program takes: 128 x 128 comparisons."""
FEW_WARPS = 16
"""32 comparisons a thread; with half the warps Triton 3.6 spills."""


@triton.jit
def slot_of_row(ids_R, slot_of_E, row_I, num_rows, num_experts, num_slots):
    """Return the slot of each row's expert; S for rows without an expert and for spare lanes."""
    id_I = tl.load(ids_R + row_I, mask=row_I < num_rows, other=-1)
    is_here_I = (id_I >= 0) & (id_I < num_experts)
    slot_I = id_I.to(tl.int32)
    if slot_of_E is not None:
        slot_I = tl.load(slot_of_E + slot_I, mask=is_here_I, other=-1)
        is_here_I = (slot_I >= 0) & (slot_I < num_slots)
    return tl.where(is_here_I, slot_I, num_slots)


@triton.jit
def group_few_kernel(
    ids_R,
    slot_of_E,
    order_R,
    inverse_R,
    offsets_S1,
    tiles_L2,
    num_rows,
    num_experts,
    num_slots,
    num_tiles,
    tile_rows,
    FEW_ROWS: tl.constexpr,
):
    row_I = tl.arange(0, FEW_ROWS)
    is_row_I = row_I < num_rows
    slot_I = slot_of_row(ids_R, slot_of_E, row_I, num_rows, num_experts, num_slots)
    # Lanes after the last row count as rows without an expert, which come last and in order.
    key_I = slot_I * FEW_ROWS + row_I
    place_I = tl.sum((key_I[None, :] < key_I[:, None]).to(tl.int32), axis=1)
    first_I = tl.sum((key_I[None, :] < (slot_I * FEW_ROWS)[:, None]).to(tl.int32), axis=1)
    tl.store(inverse_R + row_I, place_I, mask=is_row_I)
    tl.store(order_R + place_I, row_I, mask=is_row_I)
    for start in range(0, num_slots + 1, 64):
        slot_N = start + tl.arange(0, 64)
        before_N = tl.sum((slot_I[None, :] < slot_N[:, None]).to(tl.int32), axis=1)
        tl.store(offsets_S1 + slot_N, before_N, mask=slot_N <= num_slots)
    # Every tile_rows-th row of a slot begins a tile; its index is the number of those before it.
    is_start_I = (slot_I < num_slots) & ((place_I - first_I) % tile_rows == 0)
    is_start_before_IJ = (key_I[None, :] < key_I[:, None]) & is_start_I[None, :]
    tile_I = tl.sum(is_start_before_IJ.to(tl.int32), axis=1)
    tl.store(tiles_L2 + 2 * tile_I, slot_I, mask=is_start_I)
    tl.store(tiles_L2 + 2 * tile_I + 1, place_I, mask=is_start_I)
    is_unused_I = (row_I >= tl.sum(is_start_I.to(tl.int32))) & (row_I < num_tiles)
    tl.store(tiles_L2 + 2 * row_I, -1, mask=is_unused_I)
