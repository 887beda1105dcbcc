"""Expert weights in 8 or 4 bits with a scale per group of inputs, for inference.

``w = q * scale``, symmetric, each row of a matrix in groups of consecutive inputs. The bytes are
those of the compressed-tensors format (which shows 4 of them as one int32), on CPU and GPU.

S slots, Q outputs and P inputs of a matrix, G = P / group size, D model width, F expert width.
"""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .activation import Activation
from .channel_weights import ChannelExpertWeights
from .expert_weights import ExpertWeights, SlotTable, check_biases, check_slots, empty_slots

Bits = Literal[8, 4]

WIDTH_UNIT = 32
"""The inputs of a matrix, and of a group, are a multiple of this, so that vectors and tiles hold
whole groups on every processor."""

INT4_ZERO = 8
"""4 bits hold ``q + 8``."""


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
                f"{num_groups} scales for {self.width} inputs do not give groups of a multiple of "
                f"{WIDTH_UNIT}."
            )

    @property
    def bits(self) -> Bits:
        """Bits of one value."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def width(self) -> int:
        """P."""
        return self.values.shape[2] * (8 // self.bits)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.width // self.scales_SQG.shape[2]

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
    _: KW_ONLY
    slot_of_E: tuple[int, ...] | None = None
    """Slot of each expert, -1 if it is not here; None if slot e holds expert e."""
    activation: Activation = "swiglu"
    fc1_bias_SH: Tensor | None = None
    """``[S, 2F]``, not quantized: bf16, fp16 or fp32 for any type of x; None without biases."""
    fc2_bias_SD: Tensor | None = None
    """``[S, D]``."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if fc1, fc2 and their biases do not belong together."""
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

        With biases also gate_bias ``[F]``, up_bias ``[F]`` and down_bias ``[D]``.
        """
        values, scales = self.fc1.values[slot], self.fc1.scales_SQG[slot]
        gate, up = map(SlotView, values.chunk(2), scales.chunk(2))
        down = SlotView(self.fc2.values[slot], self.fc2.scales_SQG[slot])
        return {"gate": gate, "up": up, "down": down, **self.bias_views(slot)}

    def to(self, device: torch.device | str) -> "QuantizedExpertWeights":
        """Return the weights on a device."""
        bias1_SH, bias2_SD = self.fc1_bias_SH, self.fc2_bias_SD
        return replace(
            self,
            fc1=self.fc1.to(device),
            fc2=self.fc2.to(device),
            fc1_bias_SH=None if bias1_SH is None else bias1_SH.to(device),
            fc2_bias_SD=None if bias2_SD is None else bias2_SD.to(device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        parts = (*_tensors(self.fc1), *_tensors(self.fc2), *self.bias_parts)
        return sum(part.nbytes for part in parts)


SlotWeights = ExpertWeights | QuantizedExpertWeights | ChannelExpertWeights
"""The weights of the experts in some slots, in any layout."""


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


def _tensors(matrices: QuantizedMatrices) -> tuple[Tensor, Tensor]:
    return matrices.values, matrices.scales_SQG
