"""Expert weights in 8 or 4 bits with a scale per group of inputs, for inference.

``w = q * scale``, symmetric, each row of a matrix in groups of consecutive inputs. The bytes are
those of the compressed-tensors format (which shows 4 of them as one int32), on CPU and GPU.

S slots, Q outputs and P inputs of a matrix, G = P / group size, D model width, F expert width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .channel_weights import ChannelExpertWeights
from .expert_weights import ExpertWeights, empty_slots
from .few_bits import INT4_ZERO, FewBitsExpertWeights
from .group_sparse import GroupSparseExpertWeights
from .two_of_four import TwoOfFourExpertWeights

Bits = Literal[8, 4]

WIDTH_UNIT = 32
"""The inputs of a matrix, and of a group, are a multiple of this, so that vectors and tiles hold
whole groups on every processor."""


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
    def kind(self) -> str:
        """A short name for people."""
        return f"int{self.bits}"

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Values and scales."""
        return self.values, self.scales_SQG

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

    def view(self, slot: int, start: int, end: int) -> "SlotView":
        """Return rows ``[start, end)`` of a slot, to write into."""
        return SlotView(self.values[slot, start:end], self.scales_SQG[slot, start:end])

    def to(self, device: torch.device | str) -> "QuantizedMatrices":
        """Return the matrices on a device."""
        return QuantizedMatrices(self.values.to(device), self.scales_SQG.to(device))


class SlotView(NamedTuple):
    """One matrix of a slot, to write into."""

    values: Tensor
    """int8 ``[Q, P]`` or uint8 ``[Q, P / 2]``."""
    scales_QG: Tensor
    """bf16."""


class QuantizedExpertWeights(FewBitsExpertWeights[QuantizedMatrices]):
    """Gated expert weights in 8 or 4 bits."""

    __slots__ = ()


SlotWeights = (
    ExpertWeights
    | QuantizedExpertWeights
    | GroupSparseExpertWeights
    | TwoOfFourExpertWeights
    | ChannelExpertWeights
)
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
