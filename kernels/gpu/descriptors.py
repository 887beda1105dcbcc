"""fc1, fc2 and grad x on Hopper with tensor descriptors: whole tiles arrive by TMA, in place of an
address per 16 bytes, and a program computes tile after tile.

Weights come through descriptors, and so do rows that are read in order; rows that are gathered
come by pointers, since Hopper's TMA gathers nothing. Descriptors are made by the host, so a kernel
needs no memory of its own, and with it no allocator: Triton keeps that per thread, and backward
runs on threads of autograd's.

T tokens, K choices, R routed rows in slot order, S slots, L tiles, D model width, F expert width;
Q outputs and P inputs of a matrix. In a tile: M rows, N columns (or N/2 features, gate and up),
P inputs at a time.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .grouping import SlotGroups
from .tile_math import add_product, gated, left_and_right_half, tile_and_column
from .tiles import GROUP_TILES, Kernel, Tiles

DESCRIBED: frozenset[Kernel] = frozenset(("matmul",))
"""The kernels that descriptors serve; "up" may be one, whose rows come by pointers both ways. On an
H100, fc2 is 1.08 times and grad x 1.09 times as fast so, fc1 0.89 times (benchmarks/tiles.py)."""

NUM_STAGES = 4
"""As many tiles as an H200's shared memory holds."""

TMA_BYTES = 16
"""What addresses and strides of a descriptor are multiples of."""


def are_chosen(kernel: Kernel, tiles: Tiles, *described: Tensor) -> bool:
    """Say whether these tensors come through descriptors: wide tiles of 16 bits on Hopper.

    Small tiles wait for weights, whichever way they come, and fp32 is split in registers first.
    """
    is_wide = tiles.M == 128 and described[0].itemsize == 2
    return (
        kernel in DESCRIBED
        and is_wide
        and _has_tma(described[0].device)
        and all(map(can_describe, described))
    )


@functools.cache
def _has_tma(device: torch.device) -> bool:
    """Say whether the device is a Hopper GPU, or the interpreter, which plays any."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def can_describe(tensor: Tensor) -> bool:
    """Say whether TMA takes a tensor: 16-byte strides and address, its last stride or the one
    before 1."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.mT
    outer = tensor.stride()[:-1]
    is_aligned = all(stride * tensor.itemsize % TMA_BYTES == 0 for stride in outer)
    return tensor.stride(-1) == 1 and is_aligned and tensor.data_ptr() % TMA_BYTES == 0


def described_matmul(
    x_RP: Tensor, weight_SPQ: Tensor, groups: SlotGroups, precision: str, tiles: Tiles
) -> Tensor:
    """Return what ``grouped_matmul`` returns."""
    num_outputs = weight_SPQ.shape[2]
    y_RQ = x_RP.new_empty(x_RP.shape[0], num_outputs)
    is_transposed = weight_SPQ.stride(2) != 1
    if is_transposed:
        weight = TensorDescriptor.from_tensor(weight_SPQ.mT, [1, tiles.N, tiles.P])
    else:
        weight = TensorDescriptor.from_tensor(weight_SPQ, [1, tiles.P, tiles.N])
    num_tiles = groups.tiles_L2.shape[0]
    num_items = num_tiles * triton.cdiv(num_outputs, tiles.N)
    described_matmul_kernel[(min(num_items, _num_programs(x_RP.device)),)](
        TensorDescriptor.from_tensor(x_RP, [tiles.M, tiles.P]),
        groups.tiles_L2,
        groups.offsets_S1,
        weight,
        y_RQ,
        num_tiles,
        x_RP.shape[1],
        num_outputs,
        IS_TRANSPOSED=is_transposed,
        PRECISION=precision,
        M=tiles.M,
        N=tiles.N,
        P=tiles.P,
        GROUP_TILES=GROUP_TILES,
        num_warps=tiles.num_warps,
        num_stages=NUM_STAGES,
    )
    return y_RQ


def described_up_projection(
    x_TD: Tensor,
    groups: SlotGroups,
    fc1_SHD: Tensor,
    activation: str,
    precision: str,
    tiles: Tiles,
    a_RF: Tensor,
    h_RH: Tensor | None,
) -> None:
    """Write what ``up_projection`` writes."""
    d_model, d_expert = x_TD.shape[1], a_RF.shape[1]
    fc1_S2FD = fc1_SHD.unflatten(1, (2, d_expert))
    num_tiles = groups.tiles_L2.shape[0]
    num_items = num_tiles * triton.cdiv(d_expert, tiles.N // 2)
    described_up_kernel[(min(num_items, _num_programs(x_TD.device)),)](
        x_TD,
        groups.order_R,
        groups.tiles_L2,
        groups.offsets_S1,
        TensorDescriptor.from_tensor(fc1_S2FD, [1, 2, tiles.N // 2, tiles.P]),
        a_RF,
        h_RH,
        num_tiles,
        a_RF.shape[0] // x_TD.shape[0],
        d_model,
        d_expert,
        x_TD.stride(0),
        ACTIVATION=activation,
        IS_EVEN=d_model % tiles.P == 0,
        PRECISION=precision,
        M=tiles.M,
        N=tiles.N,
        P=tiles.P,
        GROUP_TILES=GROUP_TILES,
        num_warps=tiles.num_warps,
        num_stages=NUM_STAGES,
    )


@functools.cache
def _num_programs(device: torch.device) -> int:
    """One for each multiprocessor; in the interpreter a few, so that each has several tiles."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def described_matmul_kernel(
    x_desc,
    tiles_L2,
    offsets_S1,
    weight_desc,
    y_RQ,
    num_tiles,
    num_inner,
    num_outputs,
    IS_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    num_columns = tl.cdiv(num_outputs, N)
    for item in range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        tile, column = tile_and_column(item, num_tiles, num_columns, GROUP_TILES, True)
        slot = tl.load(tiles_L2 + 2 * tile)
        if slot >= 0:
            first_row = tl.load(tiles_L2 + 2 * tile + 1)
            y_MN = tl.zeros((M, N), dtype=tl.float32)
            for first in range(0, num_inner, P):
                # Rows behind the group's end are the next group's, dropped at the store; behind
                # the edges there are zeros.
                x_MP = x_desc.load([first_row, first])
                if IS_TRANSPOSED:
                    w_1NP = weight_desc.load([slot, column * N, first])
                    w_PN = tl.trans(tl.reshape(w_1NP, (N, P)))
                else:
                    w_PN = tl.reshape(weight_desc.load([slot, first, column * N]), (P, N))
                y_MN = add_product(y_MN, x_MP, w_PN, PRECISION)
            row_M = first_row + tl.arange(0, M)
            output_N = column * N + tl.arange(0, N)
            is_row_M = row_M < tl.load(offsets_S1 + slot + 1)
            tl.store(
                y_RQ + row_M.to(tl.int64)[:, None] * num_outputs + output_N[None, :],
                y_MN.to(y_RQ.dtype.element_ty),
                mask=is_row_M[:, None] & (output_N < num_outputs)[None, :],
            )


@triton.jit
def described_up_kernel(
    x_TD,
    order_R,
    tiles_L2,
    offsets_S1,
    fc1_desc,
    a_RF,
    h_RH,
    num_tiles,
    num_choices,
    d_model,
    d_expert,
    stride_x,
    ACTIVATION: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    num_columns = tl.cdiv(d_expert, N // 2)
    for item in range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        tile, column = tile_and_column(item, num_tiles, num_columns, GROUP_TILES, False)
        slot = tl.load(tiles_L2 + 2 * tile)
        if slot >= 0:
            row_M = tl.load(tiles_L2 + 2 * tile + 1) + tl.arange(0, M)
            is_row_M = row_M < tl.load(offsets_S1 + slot + 1)
            # Rows behind the group's end read token 0 and are dropped at the store.
            token_M = tl.load(order_R + row_M, mask=is_row_M, other=0) // num_choices
            inner_P = tl.arange(0, P)
            x_at = x_TD + token_M.to(tl.int64)[:, None] * stride_x + inner_P[None, :]
            first_feature = column * (N // 2)
            h_MN = tl.zeros((M, N), dtype=tl.float32)
            for first in range(0, d_model, P):
                if IS_EVEN:
                    x_MP = tl.load(x_at)
                else:
                    x_MP = tl.load(x_at, mask=(first + inner_P < d_model)[None, :], other=0)
                # Half of the columns are gates and half are the same features' up rows.
                w_12NP = fc1_desc.load([slot, 0, first_feature, first])
                h_MN = add_product(h_MN, x_MP, tl.trans(tl.reshape(w_12NP, (N, P))), PRECISION)
                x_at += P
            row_M = row_M.to(tl.int64)
            gate, up = left_and_right_half(h_MN, M, N)
            gate0, gate1 = left_and_right_half(gate, M, N // 2)
            up0, up1 = left_and_right_half(up, M, N // 2)
            # Half of the features at a time: addresses and activations of all of them spill.
            for half in tl.static_range(2):
                gate = gate0 if half == 0 else gate1
                up = up0 if half == 0 else up1
                feature = first_feature + half * (N // 4) + tl.arange(0, N // 4)
                is_stored = is_row_M[:, None] & (feature < d_expert)[None, :]
                a = gated(gate, up, ACTIVATION).to(a_RF.dtype.element_ty)
                tl.store(a_RF + row_M[:, None] * d_expert + feature[None, :], a, mask=is_stored)
                if h_RH is not None:
                    h_at = h_RH + row_M[:, None] * (2 * d_expert) + feature[None, :]
                    tl.store(h_at, gate.to(h_RH.dtype.element_ty), mask=is_stored)
                    tl.store(h_at + d_expert, up.to(h_RH.dtype.element_ty), mask=is_stored)
