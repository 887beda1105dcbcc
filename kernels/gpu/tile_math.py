"""Shared by the kernels: products of tiles, activations, and which program computes a tile.

M rows of a tile, N columns of a tile, P the inner dimension of a product.
"""

import triton
import triton.language as tl

from ..values import activation

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, which multiplies bf16 tiles as if their bits
were integers (triton issue 11584). There tiles are widened first."""

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
CLAMP = tl.constexpr(activation.CLAMP)
CLAMPED_SLOPE = tl.constexpr(activation.CLAMPED_SLOPE)


@triton.jit
def add_product(acc_MN, left_MP, right_PN, PRECISION: tl.constexpr):
    """Return ``acc + left @ right``, summed in fp32."""
    if INTERPRETED:
        left_MP = left_MP.to(tl.float32)
        right_PN = right_PN.to(tl.float32)
    return tl.dot(left_MP, right_PN, acc_MN, input_precision=PRECISION)


@triton.jit
def tile_and_column(
    program, num_tiles, num_columns, GROUP_TILES: tl.constexpr, COLUMNS_FIRST: tl.constexpr
):
    """Return the row tile and the column tile of a program.

    Programs that run at the same time share GROUP_TILES row tiles, mostly of one expert, so that
    they find rows and weights in L2. COLUMNS_FIRST walks all columns of a row tile first.
    """
    group_size = GROUP_TILES * num_columns
    first_tile = program // group_size * GROUP_TILES
    tiles_here = tl.minimum(num_tiles - first_tile, GROUP_TILES)
    inside = program % group_size
    if COLUMNS_FIRST:
        return first_tile + inside // num_columns, inside % num_columns
    return first_tile + inside % tiles_here, inside // tiles_here


@triton.constexpr_function
def has_gate(ACTIVATION):
    """Say whether fc1 has gate rows in front of the up rows."""
    return ACTIVATION not in activation.UNGATED


@triton.jit
def ungated(up, ACTIVATION: tl.constexpr):
    """Return act(up) in fp32, where there is no gate."""
    if ACTIVATION == "relu":
        return tl.maximum(up, 0.0)
    else:
        return up * (0.5 + 0.5 * tl.erf(up * SQRT_HALF))


@triton.jit
def ungated_with_slope(up, ACTIVATION: tl.constexpr):
    """Return :func:`ungated` and its derivative."""
    if ACTIVATION == "relu":
        return tl.maximum(up, 0.0), tl.where(up > 0, 1.0, 0.0)
    else:
        below = 0.5 + 0.5 * tl.erf(up * SQRT_HALF)
        density = tl.exp(-0.5 * up * up) * INVERSE_SQRT_2PI
        return up * below, below + up * density


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """Return act(gate) * factor(up), all in fp32 (values/activation.py has the formulas)."""
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "reglu":
        return tl.maximum(gate, 0.0) * up
    elif ACTIVATION == "clamped_swiglu":
        g = tl.minimum(gate, CLAMP)
        factor = tl.maximum(tl.minimum(up, CLAMP), -CLAMP) + 1
        return g * tl.sigmoid(g * CLAMPED_SLOPE) * factor
    else:
        return gate * (0.5 + 0.5 * tl.erf(gate * SQRT_HALF)) * up


@triton.jit
def gated_with_slopes(gate, up, ACTIVATION: tl.constexpr):
    """Return :func:`gated` and its derivatives with respect to gate and up."""
    if ACTIVATION == "swiglu":
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        return act * up, (sigmoid + act * (1 - sigmoid)) * up, act
    elif ACTIVATION == "reglu":
        act = tl.maximum(gate, 0.0)
        return act * up, tl.where(gate > 0, up, 0.0), act
    elif ACTIVATION == "clamped_swiglu":
        g = tl.minimum(gate, CLAMP)
        factor = tl.maximum(tl.minimum(up, CLAMP), -CLAMP) + 1
        sigmoid = tl.sigmoid(g * CLAMPED_SLOPE)
        act = g * sigmoid
        slope = (sigmoid + act * CLAMPED_SLOPE * (1 - sigmoid)) * factor
        is_up_free = (up <= CLAMP) & (up >= -CLAMP)
        return act * factor, tl.where(gate <= CLAMP, slope, 0.0), tl.where(is_up_free, act, 0.0)
    else:
        below = 0.5 + 0.5 * tl.erf(gate * SQRT_HALF)
        density = tl.exp(-0.5 * gate * gate) * INVERSE_SQRT_2PI
        act = gate * below
        return act * up, (below + gate * density) * up, act


@triton.jit
def left_and_right_half(x_MN, M: tl.constexpr, N: tl.constexpr):
    """Split a tile's columns into two halves."""
    return tl.split(tl.permute(tl.reshape(x_MN, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def columns_of(x_MN, part: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Return one of PARTS equal parts of a tile's columns; PARTS is a power of 2."""
    if PARTS == 1:
        return x_MN
    else:
        left, right = left_and_right_half(x_MN, M, N)
        half = left if part < PARTS // 2 else right
        return columns_of(half, part % (PARTS // 2), PARTS // 2, M, N // 2)
