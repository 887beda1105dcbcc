"""Expert weights in few bits: what all their kinds of matrices have in common.

S slots, Q outputs and P inputs of a matrix, D model width, F expert width, H rows of fc1: 2F with
a gate, F without.
"""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from .activation import Activation, fc1_parts, fc1_rows
from .expert_weights import SlotTable, check_biases, check_slots, wanted_shapes

INT4_ZERO = 8
"""4 bits hold ``q + 8``."""


class MatrixView(Protocol):
    """One matrix of a slot, or some of its rows, to write into. Iterating gives its tensors."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tensors in the order of the slot's bytes."""
        ...


class FewBitsMatrices(Protocol):
    """S matrices ``[Q, P]`` that are multiplied from the left: ``y = x w^T``."""

    @property
    def values(self) -> Tensor:
        """The rounded weights, ``[S, Q, bytes]``."""
        ...

    @property
    def width(self) -> int:
        """P."""
        ...

    @property
    def kind(self) -> str:
        """A short name for people, such as int4."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that the matrices consist of, ``[S, Q, ...]`` each."""
        ...

    def dequantize(self, slot: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix of a slot, ``[Q, P]``, rounded once."""
        ...

    def view(self, slot: int, start: int, end: int) -> MatrixView:
        """Return rows ``[start, end)`` of a slot, to write into."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the matrices on a device."""
        ...


Matrices = TypeVar("Matrices", bound=FewBitsMatrices)


@dataclass(frozen=True, slots=True)
class FewBitsExpertWeights(SlotTable, Generic[Matrices]):
    """Expert weights in few bits, addressed as :class:`ExpertWeights` are."""

    fc1: Matrices
    """F gate rows, if the activation has a gate, then F up rows, of D inputs."""
    fc2: Matrices
    """D rows of F inputs."""
    _: KW_ONLY
    slot_of_E: Sequence[int] | None = None
    """Slot of each expert, -1 if it is not here; None if slot e holds expert e."""
    activation: Activation = "swiglu"
    fc1_bias_SH: Tensor | None = None
    """``[S, H]``, not quantized: bf16, fp16 or fp32 for any type of x; None without biases."""
    fc2_bias_SD: Tensor | None = None
    """``[S, D]``."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if fc1, fc2 and their biases do not belong together."""
        fc1, fc2 = self.fc1, self.fc2
        shapes = (*fc1.values.shape[:2], fc1.width), (*fc2.values.shape[:2], fc2.width)
        num_slots, d_model, d_expert = shapes[1]
        if shapes[0] != (num_slots, fc1_rows(d_expert, self.activation), d_model):
            raise ValueError(
                f"fc1 {shapes[0]} and fc2 {shapes[1]} do not fit; {wanted_shapes(self)}."
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
        """Return fc1 ``[H, D]`` and fc2 ``[D, F]`` of a slot in ``dtype``."""
        return self.fc1.dequantize(slot, dtype), self.fc2.dequantize(slot, dtype)

    def slot_views(self, slot: int) -> dict[str, MatrixView | Tensor]:
        """Return the writable parts of a slot: gate and up, F rows each, and down, D rows.

        With biases also gate_bias ``[F]``, up_bias ``[F]`` and down_bias ``[D]``. Without a gate
        there are neither gate nor gate_bias.
        """
        width = self.fc2.width
        views: dict[str, MatrixView | Tensor] = {
            part: self.fc1.view(slot, index * width, (index + 1) * width)
            for index, part in enumerate(fc1_parts(self.activation))
        }
        return views | {"down": self.fc2.view(slot, 0, self.d_model), **self.bias_views(slot)}

    def to(self, device: torch.device | str) -> Self:
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
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors of both matrices, without biases."""
        return (*self.fc1.tensors, *self.fc2.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(part.nbytes for part in (*self.parts, *self.bias_parts))
