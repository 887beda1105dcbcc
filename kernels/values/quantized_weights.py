"""Expert weights in 8 or 4 bits with a scale per group of inputs, for inference.

``w = q * scale``, symmetric, each row of a matrix in groups of consecutive inputs. The bytes are
those of the compressed-tensors format (which shows 4 of them as one int32), on CPU and GPU alike.

S slots, Q outputs and P inputs of a matrix, G = P / group size, D model width, F expert width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..linear import bf16_row_stable_linear
from .activation import Activation
from .expert_weights import ExpertWeights, SlotTable, check_biases, check_slots, empty_slots

Bits = Literal[8, 4]

WIDTH_UNIT = 32
"""Inputs of a matrix, and a group's, are a multiple of this: vectors and tiles then hold whole
groups, whatever the processor."""

INT4_GROUP_SIZE = 64
"""Inputs that share a scale in 4 bits unless the caller says otherwise; 4.25 bits a weight."""

INT4_ZERO = 8
"""4 bits hold ``q + 8``."""

INT4_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of the largest magnitude that the widest 4-bit value may stand for; each group takes the
one with the smallest squared error."""


@dataclass(frozen=True, slots=True)
class QuantizedMatrices:
    """S matrices ``[Q, P]`` that are multiplied from the left: ``y = x w^T``."""

    values: Tensor
    """int8 ``[S, Q, P]``, or uint8 ``[S, Q, P / 2]``: inputs 2i in the low half of byte i and
    2i + 1 in the high half, each as ``q + 8``."""
    scales_SQG: Tensor
    """bf16 ``[S, Q, G]``."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for types and shapes that do not belong together."""
        values, scales = self.values, self.scales_SQG
        if values.dtype not in (torch.int8, torch.uint8) or scales.dtype != torch.bfloat16:
            raise ValueError(
                f"values have type {values.dtype} and scales {scales.dtype}; they must be int8 (or "
                "uint8 for 4 bits) and bfloat16."
            )
        if values.ndim != 3 or values.shape[:2] != scales.shape[:2] or scales.ndim != 3:
            raise ValueError(
                f"values {tuple(values.shape)} and scales {tuple(scales.shape)} do not fit; they "
                "must be [S, Q, P] (P / 2 bytes for 4 bits) and [S, Q, groups]."
            )
        num_groups = scales.shape[2]
        if num_groups == 0 or self.width % num_groups or self.group_size % WIDTH_UNIT:
            raise ValueError(
                f"{num_groups} scales for {self.width} inputs make no groups of a multiple of "
                f"{WIDTH_UNIT}."
            )

    @property
    def bits(self) -> Bits:
        """Of one value."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def width(self) -> int:
        """P."""
        return self.values.shape[2] * (8 // self.bits)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.width // self.scales_SQG.shape[2]

    def multiply(self, x_NP: Tensor, slot: int) -> Tensor:
        """Return ``x w^T`` with a slot's matrix, ``[N, Q]``, on torch's operators.

        In bf16 on a CPU, a row's bits do not depend on the rows beside it.
        """
        if x_NP.is_cpu and self.bits == 8 and self.scales_SQG.shape[2] == 1:
            scales_Q = self.scales_SQG[slot, :, 0].to(x_NP.dtype)
            return torch._weight_int8pack_mm(x_NP, self.values[slot], scales_Q)
        return bf16_row_stable_linear(x_NP, self.dequantize(slot, x_NP.dtype))

    def dequantize(self, slot: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix of a slot, ``[Q, P]``, rounded once."""
        values_QP = self.values[slot]
        if self.bits == 4:
            halves_QP2 = torch.stack((values_QP & 15, values_QP >> 4), dim=-1)
            values_QP = halves_QP2.flatten(-2).to(torch.int8) - INT4_ZERO
        wide = torch.promote_types(dtype, torch.float32)
        scales_QG = self.scales_SQG[slot].to(wide)
        grouped_QGP = values_QP.to(wide).unflatten(-1, (-1, self.group_size))
        return (grouped_QGP * scales_QG.unsqueeze(-1)).flatten(-2).to(dtype)

    def to(self, device: torch.device | str) -> "QuantizedMatrices":
        """Return the matrices on a device."""
        return QuantizedMatrices(self.values.to(device), self.scales_SQG.to(device))


class SlotView(NamedTuple):
    """One matrix of a slot, to write into."""

    values: Tensor
    """int8 ``[Q, P]`` or uint8 ``[Q, P / 2]``."""
    scales_QG: Tensor
    """bf16."""


@dataclass(frozen=True, slots=True)
class QuantizedExpertWeights(SlotTable):
    """Gated expert weights in 8 or 4 bits, addressed as :class:`ExpertWeights` are."""

    fc1: QuantizedMatrices
    """F gate rows, then F up rows, of D inputs."""
    fc2: QuantizedMatrices
    """D rows of F inputs."""
    slot_of_E: tuple[int, ...] | None = None
    """Slot of each expert, -1 where it is not here; None where slot e holds expert e."""
    activation: Activation = "swiglu"
    fc1_bias_SH: Tensor | None = None
    """``[S, 2F]``, not quantized: bf16, fp16 or fp32, whatever x's type; None without biases."""
    fc2_bias_SD: Tensor | None = None
    """``[S, D]``."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` where fc1, fc2 and their biases do not belong together."""
        fc1, fc2 = self.fc1, self.fc2
        shapes = (*fc1.values.shape[:2], fc1.width), (*fc2.values.shape[:2], fc2.width)
        num_slots, d_model, d_expert = shapes[1]
        if shapes[0] != (num_slots, 2 * d_expert, d_model):
            raise ValueError(
                f"fc1 {shapes[0]} and fc2 {shapes[1]} do not fit; they must be [S, 2F, D] and "
                "[S, D, F]."
            )
        check_slots(self)
        check_biases(self.fc1_bias_SH, self.fc2_bias_SD, shapes[0][:2], shapes[1][:2])

    @property
    def num_slots(self) -> int:
        """S."""
        return self.fc1.values.shape[0]

    @property
    def d_model(self) -> int:
        """D."""
        return self.fc1.width

    def matrices(self, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return fc1 ``[2F, D]`` and fc2 ``[D, F]`` of a slot in ``dtype``."""
        return self.fc1.dequantize(slot, dtype), self.fc2.dequantize(slot, dtype)

    def slot_views(self, slot: int) -> dict[str, SlotView | Tensor]:
        """Return the writable parts of a slot: gate and up, F rows each, and down, D rows.

        Where there are biases also gate_bias ``[F]``, up_bias ``[F]`` and down_bias ``[D]``.
        """
        values, scales = self.fc1.values[slot], self.fc1.scales_SQG[slot]
        gate, up = map(SlotView, values.chunk(2), scales.chunk(2))
        down = SlotView(self.fc2.values[slot], self.fc2.scales_SQG[slot])
        return {"gate": gate, "up": up, "down": down, **self.bias_views(slot)}

    def to(self, device: torch.device | str) -> "QuantizedExpertWeights":
        """Return the weights on a device."""
        matrices = (self.fc1.to(device), self.fc2.to(device))
        biases = (part.to(device) for part in self.bias_parts)
        return QuantizedExpertWeights(*matrices, self.slot_of_E, self.activation, *biases)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        parts = (*_tensors(self.fc1), *_tensors(self.fc2), *self.bias_parts)
        return sum(part.nbytes for part in parts)


AnyExperts = ExpertWeights | QuantizedExpertWeights


def quantize_experts(
    experts: ExpertWeights, bits: Bits, group_size: int | None = None
) -> QuantizedExpertWeights:
    """Round expert weights to 8 or 4 bits and keep their biases; see :func:`quantize`."""
    fc1 = quantize(experts.fc1_SHD.detach(), bits, group_size)
    fc2 = quantize(experts.fc2_SDF.detach(), bits, group_size)
    biases = (part.detach() for part in experts.bias_parts)
    return QuantizedExpertWeights(fc1, fc2, experts.slot_of_E, experts.activation, *biases)


def quantize(weight_SQP: Tensor, bits: Bits, group_size: int | None = None) -> QuantizedMatrices:
    """Round to the nearest of 255 or 15 values per group.

    ``group_size`` is the inputs that share a scale: unless given, all of a row in 8 bits, and
    ``INT4_GROUP_SIZE`` in 4. Raises ``ValueError`` where it does not divide the width, or is no
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
    # Slot by slot: fp32 copies of all experts at once would be several times the model.
    for slot, weight_QP in enumerate(weight_SQP):
        found.values[slot], found.scales_SQG[slot] = _quantize_one(weight_QP, bits, group_size)
    return found


def empty_matrices(
    num_slots: int, rows: int, width: int, bits: Bits, group_size: int, device: torch.device
) -> QuantizedMatrices:
    """Allocate ``[num_slots, rows, width]``; on the CPU as :func:`empty_slots` does."""
    dtype, row_bytes = (torch.int8, width) if bits == 8 else (torch.uint8, width // 2)
    num_groups = width // group_size
    if device.type == "cpu":
        values = empty_slots(num_slots, rows, row_bytes, dtype)
        scales = empty_slots(num_slots, rows, num_groups, torch.bfloat16)
    else:
        values = torch.empty(num_slots, rows, row_bytes, dtype=dtype, device=device)
        scales = torch.empty(num_slots, rows, num_groups, dtype=torch.bfloat16, device=device)
    return QuantizedMatrices(values, scales)


def _quantize_one(weight_QP: Tensor, bits: Bits, group_size: int) -> tuple[Tensor, Tensor]:
    grouped_QGP = weight_QP.float().unflatten(-1, (-1, group_size))
    largest_QG1 = grouped_QGP.abs().amax(dim=-1, keepdim=True)
    if bits == 8:
        scales_QG1 = _as_scales(largest_QG1 / 127)
        values_QP = _rounded(grouped_QGP, scales_QG1, 127).flatten(-2)
        return values_QP.to(torch.int8), scales_QG1.squeeze(-1).bfloat16()
    scales_QG1 = _best_int4_scales(grouped_QGP, largest_QG1 / 7)
    values_QP = (_rounded(grouped_QGP, scales_QG1, 7).flatten(-2) + INT4_ZERO).to(torch.uint8)
    packed = values_QP[:, ::2] | values_QP[:, 1::2] << 4
    return packed, scales_QG1.squeeze(-1).bfloat16()


def _best_int4_scales(grouped_QGP: Tensor, widest_QG1: Tensor) -> Tensor:
    best_QG1, least_QG1 = widest_QG1, torch.full_like(widest_QG1, torch.inf)
    for clip in INT4_CLIPS:
        scales_QG1 = _as_scales(widest_QG1 * clip)
        off_QGP = _rounded(grouped_QGP, scales_QG1, 7) * scales_QG1 - grouped_QGP
        error_QG1 = off_QGP.square().sum(dim=-1, keepdim=True)
        is_better_QG1 = error_QG1 < least_QG1
        best_QG1 = torch.where(is_better_QG1, scales_QG1, best_QG1)
        least_QG1 = torch.where(is_better_QG1, error_QG1, least_QG1)
    return best_QG1


def _as_scales(scales: Tensor) -> Tensor:
    """Round to the stored type first, so that values are rounded for what they will mean."""
    return scales.bfloat16().float()


def _rounded(grouped_QGP: Tensor, scales_QG1: Tensor, limit: int) -> Tensor:
    # A group of zeros, or one below bf16's range, has scale 0: its values are 0 too.
    inverse_QG1 = torch.where(scales_QG1 > 0, 1 / scales_QG1, 0)
    return (grouped_QGP * inverse_QG1).round().clamp(-limit, limit)


def _tensors(matrices: QuantizedMatrices) -> tuple[Tensor, Tensor]:
    return matrices.values, matrices.scales_SQG
