"""What the kernels share: products of tiles, gated activations, and who computes which tile.

M rows of a tile, N columns of a tile, P the inner dimension of a product.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, which multiplies bf16 tiles as if their bits
were integers (triton issue 11584); there they are widened first."""

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


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


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """Return silu, relu or exact gelu of the gate, all in fp32."""
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate)
    elif ACTIVATION == "reglu":
        return tl.maximum(gate, 0.0)
    else:
        return gate * (0.5 + 0.5 * tl.erf(gate * SQRT_HALF))


@triton.jit
def activate_with_slope(gate, ACTIVATION: tl.constexpr):
    """Return :func:`activate` and its derivative (kernels/activation.py has the formulas)."""
    if ACTIVATION == "swiglu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        return value, sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "reglu":
        return tl.maximum(gate, 0.0), tl.where(gate > 0, 1.0, 0.0)
    else:
        below = 0.5 + 0.5 * tl.erf(gate * SQRT_HALF)
        density = tl.exp(-0.5 * gate * gate) * INVERSE_SQRT_2PI
        return gate * below, below + gate * density


@triton.jit
def left_and_right_half(x_MN, M: tl.constexpr, N: tl.constexpr):
    """Split a tile's columns into two halves."""
    return tl.split(tl.permute(tl.reshape(x_MN, (M, 2, N // 2)), (0, 2, 1)))
