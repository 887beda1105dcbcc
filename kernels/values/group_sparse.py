"""Group-sparse expert weights in 4 bits, for inference (after GQSA, arXiv 2412.17560).

Each row of a matrix is cut into groups of ``GROUP`` consecutive inputs. Every row keeps the same
number of groups, so work is balanced and no row pointers are needed. The groups that it keeps have
``w = q * scale``, symmetric, as in quantized_weights.py; all others are zero and are not stored.

S slots, Q outputs and P inputs of a matrix, N groups that a row keeps, B = N * GROUP / 2 bytes,
D model width, F expert width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .expert_weights import empty_slots
from .few_bits import INT4_ZERO, FewBitsExpertWeights

GROUP = 32
"""Inputs of a group. On every processor that is a whole number of the vectors that int4 is
multiplied in: with AVX512-VNNI a group of x is one register. A scale and a column add 24 bits to
128; groups of 16, as in the paper, would add them to 64."""
GROUP_BYTES = GROUP // 2

COLUMN_TYPES = (torch.uint8, torch.int16)
"""Of numbers of groups: one byte while a row has at most 256."""


def column_type(width: int) -> torch.dtype:
    """Return the type of the columns of a matrix of ``width`` inputs."""
    return COLUMN_TYPES[0] if width // GROUP <= 256 else COLUMN_TYPES[1]


@dataclass(frozen=True, slots=True)
class GroupSparseView:
    """One matrix of a slot, or some of its rows, to write into."""

    values_QB: Tensor
    columns_QN: Tensor
    scales_QN: Tensor
    width: int
    """P."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tensors."""
        yield from (self.values_QB, self.columns_QN, self.scales_QN)


@dataclass(frozen=True, slots=True)
class GroupSparseMatrices:
    """S matrices ``[Q, P]`` that are multiplied from the left: ``y = x w^T``."""

    values: Tensor
    """uint8 ``[S, Q, B]``: the kept groups one after the other, 16 bytes each. Input 2i of a group
    is in the low half of byte i and 2i + 1 in the high half, each as ``q + 8``."""
    columns_SQN: Tensor
    """Which groups of the row these are, ascending. Kernels do not check them. Check columns
    that come from a file with :func:`check_columns`."""
    scales_SQN: Tensor
    """bf16."""
    width: int
    """P."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for types and shapes that do not belong together."""
        values, columns, scales = self.tensors
        types = (torch.uint8, column_type(self.width), torch.bfloat16)
        if (values.dtype, columns.dtype, scales.dtype) != types:
            raise ValueError(
                f"values, columns and scales have types {values.dtype}, {columns.dtype} and "
                f"{scales.dtype}; for {self.width} inputs they must be {types[0]}, {types[1]} and "
                f"{types[2]}."
            )
        shape = tuple(columns.shape)
        fits = len(shape) == 3 and tuple(scales.shape) == shape
        if not fits or tuple(values.shape) != (*shape[:2], shape[2] * GROUP_BYTES):
            raise ValueError(
                f"values {tuple(values.shape)}, columns {shape} and scales {tuple(scales.shape)} "
                f"do not fit; they must be [S, Q, {GROUP_BYTES} N], [S, Q, N] and [S, Q, N]."
            )
        if self.width % GROUP or not 1 <= shape[2] <= self.width // GROUP:
            raise ValueError(
                f"rows keep {shape[2]} groups of {GROUP} of {self.width} inputs; they must keep at "
                "least one and at most all, and groups must divide the inputs."
            )

    @property
    def kept(self) -> int:
        """N."""
        return self.columns_SQN.shape[2]

    @property
    def kind(self) -> str:
        """A short name for people."""
        return f"int4_sparse with {self.kept} of {self.width // GROUP} groups"

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, columns and scales."""
        return self.values, self.columns_SQN, self.scales_SQN

    def dequantize(self, slot: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix of a slot, ``[Q, P]``, rounded once."""
        return widened(self.view(slot, 0, self.values.shape[1]), dtype)

    def view(self, slot: int, start: int, end: int) -> GroupSparseView:
        """Return rows ``[start, end)`` of a slot, to write into."""
        values, columns, scales = (part[slot, start:end] for part in self.tensors)
        return GroupSparseView(values, columns, scales, self.width)

    def to(self, device: torch.device | str) -> "GroupSparseMatrices":
        """Return the matrices on a device."""
        values, columns, scales = (part.to(device) for part in self.tensors)
        return GroupSparseMatrices(values, columns, scales, self.width)


class GroupSparseExpertWeights(FewBitsExpertWeights[GroupSparseMatrices]):
    """Gated expert weights with pruned groups, in 4 bits."""

    __slots__ = ()


def widened(view: GroupSparseView, dtype: torch.dtype) -> Tensor:
    """Return the plain rows that a view stands for, ``[Q, P]``, rounded once.

    The columns must be in range.
    """
    rows, kept = view.columns_QN.shape
    bytes_QN = view.values_QB.unflatten(-1, (kept, GROUP_BYTES))
    halves = torch.stack((bytes_QN & 15, bytes_QN >> 4), dim=-1).flatten(-2).to(torch.int8)
    wide = torch.promote_types(dtype, torch.float32)
    scales_QN1 = view.scales_QN.to(wide).unsqueeze(-1)
    groups_QNG = ((halves - INT4_ZERO).to(wide) * scales_QN1).to(dtype)
    plain = groups_QNG.new_zeros(rows, view.width // GROUP, GROUP)
    index_QNG = view.columns_QN.long().unsqueeze(-1).expand(-1, -1, GROUP)
    return plain.scatter_(1, index_QNG, groups_QNG).flatten(-2)


def check_columns(columns_QN: Tensor, width: int) -> None:
    """Raise ``ValueError`` unless columns ascend and name groups of ``width`` inputs."""
    groups = width // GROUP
    # Ascending from the first, which is at least 0, to the last: then all are in range.
    ascend = bool((columns_QN[:, 1:] > columns_QN[:, :-1]).all())
    if not ascend or int(columns_QN[:, 0].min()) < 0 or int(columns_QN[:, -1].max()) >= groups:
        raise ValueError(f"its columns do not ascend from 0 to {groups - 1} at most")


def empty_group_sparse(
    num_slots: int, rows: int, width: int, kept: int, device: torch.device
) -> GroupSparseMatrices:
    """Allocate ``[num_slots, rows, width]``; on the CPU as :func:`empty_slots` does."""
    kinds = ((kept * GROUP_BYTES, torch.uint8), (kept, column_type(width)), (kept, torch.bfloat16))
    if device.type == "cpu":
        parts = [empty_slots(num_slots, rows, size, dtype) for size, dtype in kinds]
    else:
        shape = (num_slots, rows)
        parts = [torch.empty(*shape, n, dtype=dtype, device=device) for n, dtype in kinds]
    values, columns, scales = parts
    return GroupSparseMatrices(values, columns, scales, width)
