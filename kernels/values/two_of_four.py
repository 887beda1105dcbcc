"""2:4 sparse expert weights in bf16, for inference: two of four consecutive inputs are stored.

Nothing is rounded, so results are those of the same weights in the plain layout. A row takes 0.5625
of its bytes in bf16: half for values, a sixteenth for places.

S slots, Q outputs and P inputs of a matrix, V = P / 2 values and B = P / 8 bytes of places,
D model width, F expert width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .expert_weights import ExpertWeights, empty_slots
from .few_bits import FewBitsExpertWeights
from .n_of_m import NOfM, keep_mask

PATTERN = NOfM(2, 4)
UNIT = 8
"""The inputs of a matrix are a multiple of this: a byte has the places of two quads."""


@dataclass(frozen=True, slots=True)
class TwoOfFourView:
    """One matrix of a slot, or some of its rows, to write into."""

    values_QV: Tensor
    places_QB: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tensors."""
        yield from (self.values_QV, self.places_QB)

    @property
    def shape(self) -> tuple[int, int]:
        """Q and P."""
        return self.values_QV.shape[0], 2 * self.values_QV.shape[1]


@dataclass(frozen=True, slots=True)
class TwoOfFourMatrices:
    """S matrices ``[Q, P]`` that are multiplied from the left: ``y = x w^T``."""

    values: Tensor
    """bf16 ``[S, Q, V]``: the two values of each quad, in order."""
    places_SQB: Tensor
    """uint8 ``[S, Q, B]``: where in their quads they are. Quad 2i is in the low half of byte i and
    quad 2i + 1 in the high half, each as ``first + 4 * second`` with first < second."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for types and shapes that do not belong together."""
        values, places = self.tensors
        if (values.dtype, places.dtype) != (torch.bfloat16, torch.uint8):
            raise ValueError(
                f"values and places have types {values.dtype} and {places.dtype}; they must be "
                "bfloat16 and uint8."
            )
        shape = tuple(places.shape)
        if len(shape) != 3 or tuple(values.shape) != (*shape[:2], shape[2] * UNIT // 2):
            raise ValueError(
                f"values {tuple(values.shape)} and places {shape} do not fit; they must be "
                "[S, Q, P / 2] and [S, Q, P / 8]."
            )

    @property
    def width(self) -> int:
        """P."""
        return 2 * self.values.shape[2]

    @property
    def kind(self) -> str:
        """A short name for people."""
        return "2:4 in bf16"

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Values and places."""
        return self.values, self.places_SQB

    def dequantize(self, slot: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix of a slot, ``[Q, P]``, with its zeros."""
        return unpacked(self.view(slot, 0, self.values.shape[1]), dtype)

    def view(self, slot: int, start: int, end: int) -> TwoOfFourView:
        """Return rows ``[start, end)`` of a slot, to write into."""
        return TwoOfFourView(self.values[slot, start:end], self.places_SQB[slot, start:end])

    def to(self, device: torch.device | str) -> "TwoOfFourMatrices":
        """Return the matrices on a device."""
        return TwoOfFourMatrices(self.values.to(device), self.places_SQB.to(device))


class TwoOfFourExpertWeights(FewBitsExpertWeights[TwoOfFourMatrices]):
    """Gated expert weights of which two of four are stored."""

    __slots__ = ()


def pack(weight_QP: Tensor) -> TwoOfFourView:
    """Return a matrix packed, rounded to bf16 once.

    A quad with fewer than two weights also stores the first of its zeros. Raises ``ValueError`` for
    a quad with more than two.
    """
    weight_QP = weight_QP.detach().bfloat16()
    rows, width = weight_QP.shape
    if width % UNIT:
        raise ValueError(f"has {width} inputs, which must be a multiple of {UNIT}")
    is_stored_QP = keep_mask((weight_QP != 0).float(), PATTERN)
    left_out_QP = (weight_QP != 0) & ~is_stored_QP
    if bool(left_out_QP.any()):
        row, column = left_out_QP.nonzero()[0].tolist()
        first = column - column % 4
        raise ValueError(f"has more than 2 weights in inputs {first} to {first + 3} of row {row}")
    index = is_stored_QP.flatten().nonzero().flatten()
    values_QV = weight_QP.flatten()[index].view(rows, width // 2)
    first_N, second_N = (index % 4).view(-1, 2).unbind(1)
    low_QB, high_QB = (first_N + 4 * second_N).view(rows, -1, 2).unbind(2)
    return TwoOfFourView(values_QV, (low_QB | high_QB << 4).to(torch.uint8))


def unpacked(view: TwoOfFourView, dtype: torch.dtype) -> Tensor:
    """Return the plain rows that a view stands for, ``[Q, P]``."""
    rows, width = view.shape
    quads_QB2 = torch.stack((view.places_QB & 15, view.places_QB >> 4), dim=-1)
    places_QV = torch.stack((quads_QB2 & 3, quads_QB2 >> 2), dim=-1).flatten(1).long()
    plain_QP = torch.zeros(rows, width, dtype=dtype, device=view.values_QV.device)
    starts_V = torch.arange(0, width, 4, device=places_QV.device).repeat_interleave(2)
    return plain_QP.scatter_(1, places_QV + starts_V, view.values_QV.to(dtype))


def check_places(places_QB: Tensor) -> None:
    """Raise ``ValueError`` unless each quad names two different inputs, in order."""
    low, high = places_QB & 15, places_QB >> 4
    is_wrong = ((low & 3) >= (low >> 2)) | ((high & 3) >= (high >> 2))
    if bool(is_wrong.any()):
        raise ValueError("its places do not name two inputs of each four, in order")


def pack_experts(experts: ExpertWeights) -> TwoOfFourExpertWeights:
    """Pack 2:4 weights of experts, and keep their biases; see :func:`pack`."""
    bias1_SH, bias2_SD = experts.fc1_bias_SH, experts.fc2_bias_SD
    return TwoOfFourExpertWeights(
        _pack_all(experts.fc1_SHD),
        _pack_all(experts.fc2_SDF),
        slot_of_E=experts.slot_of_E,
        activation=experts.activation,
        fc1_bias_SH=None if bias1_SH is None else bias1_SH.detach(),
        fc2_bias_SD=None if bias2_SD is None else bias2_SD.detach(),
    )


def _pack_all(weight_SQP: Tensor) -> TwoOfFourMatrices:
    views = [pack(weight_QP) for weight_QP in weight_SQP]
    values, places = (torch.stack(part) for part in zip(*views, strict=True))
    return TwoOfFourMatrices(values, places)


def empty_two_of_four(
    num_slots: int, rows: int, width: int, device: torch.device
) -> TwoOfFourMatrices:
    """Allocate ``[num_slots, rows, width]``; on the CPU as :func:`empty_slots` does."""
    kinds = ((width // 2, torch.bfloat16), (width // UNIT, torch.uint8))
    if device.type == "cpu":
        parts = [empty_slots(num_slots, rows, size, dtype) for size, dtype in kinds]
    else:
        shape = (num_slots, rows)
        parts = [torch.empty(*shape, n, dtype=dtype, device=device) for n, dtype in kinds]
    return TwoOfFourMatrices(*parts)
