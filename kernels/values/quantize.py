"""Round expert weights to 8 or 4 bits.

S slots, Q outputs and P inputs of a matrix, G = P / group size.
"""

import torch
from torch import Tensor

from .expert_weights import ExpertWeights
from .few_bits import INT4_ZERO
from .quantized_weights import (
    WIDTH_UNIT,
    Bits,
    QuantizedExpertWeights,
    QuantizedMatrices,
    empty_matrices,
)

INT4_GROUP_SIZE = 64
"""Inputs that share a scale in 4 bits by default; 4.25 bits a weight."""

INT4_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Fractions of the largest magnitude that the largest 4-bit value may stand for; each group uses
the one with the smallest squared error."""


def quantize_experts(
    experts: ExpertWeights, bits: Bits, group_size: int | None = None
) -> QuantizedExpertWeights:
    """Round expert weights to 8 or 4 bits and keep their biases; see :func:`quantize`."""
    fc1 = quantize(experts.fc1_SHD.detach(), bits, group_size)
    fc2 = quantize(experts.fc2_SDF.detach(), bits, group_size)
    bias1_SH, bias2_SD = experts.fc1_bias_SH, experts.fc2_bias_SD
    return QuantizedExpertWeights(
        fc1,
        fc2,
        slot_of_E=experts.slot_of_E,
        activation=experts.activation,
        fc1_bias_SH=None if bias1_SH is None else bias1_SH.detach(),
        fc2_bias_SD=None if bias2_SD is None else bias2_SD.detach(),
    )


def quantize(weight_SQP: Tensor, bits: Bits, group_size: int | None = None) -> QuantizedMatrices:
    """Round to the nearest of 255 or 15 values per group.

    ``group_size`` is the number of inputs that share a scale; by default a whole row in 8 bits and
    ``INT4_GROUP_SIZE`` in 4. Raises ``ValueError`` if it does not divide the width or is not a
    multiple of ``WIDTH_UNIT``.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits}; use 8 or 4.")
    num_slots, rows, width = weight_SQP.shape
    if group_size is None:
        group_size = width if bits == 8 else INT4_GROUP_SIZE
    if group_size <= 0 or group_size % WIDTH_UNIT or width % group_size:
        raise ValueError(
            f"group_size is {group_size}; for matrices of {width} inputs use a multiple of "
            f"{WIDTH_UNIT} that divides them."
        )
    found = empty_matrices(num_slots, rows, width, bits, group_size, weight_SQP.device)
    # Slot by slot: fp32 copies of all experts together would be several times the model.
    for slot, weight_QP in enumerate(weight_SQP):
        found.values[slot], found.scales_SQG[slot] = _quantize_one(weight_QP, bits, group_size)
    return found


def _quantize_one(weight_QP: Tensor, bits: Bits, group_size: int) -> tuple[Tensor, Tensor]:
    grouped_QGP = weight_QP.float().unflatten(-1, (-1, group_size))
    largest_QG1 = grouped_QGP.abs().amax(dim=-1, keepdim=True)
    if bits == 8:
        scales_QG1 = _as_scales(largest_QG1 / 127)
        values_QP = rounded(grouped_QGP, scales_QG1, 127).flatten(-2)
        return values_QP.to(torch.int8), scales_QG1.squeeze(-1).bfloat16()
    scales_QG1 = best_int4_scales(grouped_QGP, largest_QG1 / 7)
    values_QP = (rounded(grouped_QGP, scales_QG1, 7).flatten(-2) + INT4_ZERO).to(torch.uint8)
    packed = values_QP[:, ::2] | values_QP[:, 1::2] << 4
    return packed, scales_QG1.squeeze(-1).bfloat16()


def best_int4_scales(
    grouped_QGP: Tensor, widest_QG1: Tensor, importance: Tensor | None = None
) -> Tensor:
    """Return the stored scale of each group: the fraction of ``widest`` with the least error.

    ``importance`` weighs the squared error of each value; None = all the same.
    """
    best_QG1, least_QG1 = widest_QG1, torch.full_like(widest_QG1, torch.inf)
    for clip in INT4_CLIPS:
        scales_QG1 = _as_scales(widest_QG1 * clip)
        off_QGP = rounded(grouped_QGP, scales_QG1, 7) * scales_QG1 - grouped_QGP
        squares_QGP = off_QGP.square()
        if importance is not None:
            squares_QGP *= importance
        error_QG1 = squares_QGP.sum(dim=-1, keepdim=True)
        is_better_QG1 = error_QG1 < least_QG1
        best_QG1 = torch.where(is_better_QG1, scales_QG1, best_QG1)
        least_QG1 = torch.where(is_better_QG1, error_QG1, least_QG1)
    return best_QG1


def _as_scales(scales: Tensor) -> Tensor:
    """Round scales to their stored type first, so that values are rounded for the stored scale."""
    return scales.bfloat16().float()


def rounded(grouped_QGP: Tensor, scales_QG1: Tensor, limit: int) -> Tensor:
    """Return the nearest multiples of the scales, as integers up to ``limit``."""
    # A group of zeros, or one below bf16's range, has scale 0: its values are 0 too.
    inverse_QG1 = torch.where(scales_QG1 > 0, 1 / scales_QG1, 0)
    return (grouped_QGP * inverse_QG1).round().clamp(-limit, limit)
