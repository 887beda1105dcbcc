"""Weights of 4 and 8 bits in the pack-quantized layout of the compressed-tensors format.

A matrix ``X.weight`` ``[Q, P]`` is stored as ``X.weight_packed``, int32 with ``32 / bits``
consecutive inputs in a word, the first in its lowest bits, each as ``q + 2^(bits - 1)``;
``X.weight_scale`` ``[Q, G]``; and ``X.weight_shape``, int64 ``(Q, P)``. Symmetric: w = q * scale.
quantized_config.py reads and writes the part of config.json about it.

Q outputs and P inputs of a matrix, G groups of inputs that share a scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...errors import ModelFileError
from ...kernels.values.quantized_weights import (
    WIDTH_UNIT,
    Bits,
    QuantizedMatrices,
    SlotView,
    empty_matrices,
)
from .extents import Piece, Place

Reader = Callable[[str, Tensor], object]
"""Fills a tensor with the stored tensor of a name, like ``ModelFolder.read_into``."""

INT8_SIGN = 0x80
"""Flipping this bit turns a signed byte into ``q + 128`` and back."""


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """How the weights of a model are rounded."""

    bits: Bits
    group_size: int | None
    """Inputs that share a scale; None = a whole row."""

    def of(self, name: str) -> "PackedFormat":
        """Return this format: every quantized matrix has it."""
        return self

    def width_of_group(self, name: str, width: int) -> int:
        """Return the inputs that share a scale in a matrix of ``width`` inputs.

        Raises :class:`ModelFileError` for a width that is not a multiple of the group.
        """
        group_size = self.group_size or width
        if width % group_size or group_size % WIDTH_UNIT:
            raise ModelFileError(
                f"{name} has {width} inputs in groups of {group_size}; groups must divide the "
                f"inputs and be a multiple of {WIDTH_UNIT}."
            )
        return group_size

    def stored(
        self, name: str, rows: int, width: int
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return names, types and shapes of what is stored for ``name``, a ``[rows, width]``."""
        packed, scale, shape = names_of(name)
        num_groups = width // self.width_of_group(name, width)
        return {
            packed: (torch.int32, (rows, width * self.bits // 32)),
            scale: (torch.bfloat16, (rows, num_groups)),
            shape: (torch.int64, (2,)),
        }


def to_stored(name: str, view: SlotView) -> dict[str, Tensor]:
    """Return the stored tensors of matrix ``name``."""
    is_int8 = view.values.dtype == torch.int8
    values = view.values.contiguous().view(torch.uint8)
    width = values.shape[1] if is_int8 else 2 * values.shape[1]
    if is_int8:
        values = values ^ INT8_SIGN
    packed, scale, shape = names_of(name)
    return {
        packed: values.view(torch.int32),
        scale: view.scales_QG,
        shape: torch.tensor([values.shape[0], width]),
    }


def read_matrix(read: Reader, name: str, view: SlotView) -> None:
    """Fill ``view`` with matrix ``name``; errors of ``read`` pass through.

    Nothing but ``view`` is allocated. ``weight_shape`` is not read: P is a multiple of 32, so
    it follows from the other shapes. Scales of another type are rounded to bf16.
    """
    packed, scale, _ = names_of(name)
    read(packed, view.values.view(torch.int32))
    if view.values.dtype == torch.int8:
        _flip_sign(view)
    read(scale, view.scales_QG)


def read_plain(read: Reader, name: str, packed: PackedFormat, out_QP: Tensor) -> None:
    """Fill ``out_QP`` with the dequantized matrix ``name``, rounded once."""
    rows, width = out_QP.shape
    group_size = packed.width_of_group(name, width)
    found = empty_matrices(1, rows, width, packed.bits, group_size, torch.device("cpu"))
    read_matrix(read, name, slot_view(found, 0))
    out_QP.copy_(found.dequantize(0, out_QP.dtype))


def packed_pieces(
    place: Callable[[str, tuple[int, ...]], Place],
    packed: PackedFormat,
    name: str,
    view: SlotView | Tensor,
) -> list[Piece]:
    """Return what matrix ``name`` consists of, to fill quantized memory or a dequantized matrix.

    ``place`` finds a stored tensor of a name and a shape.
    """
    words, scale, _ = names_of(name)
    if isinstance(view, SlotView):
        packed_words = view.values.view(torch.int32)
        after = partial(_flip_sign, view) if view.values.dtype == torch.int8 else None
        return [
            Piece((place(words, tuple(packed_words.shape)),), packed_words, after),
            Piece((place(scale, tuple(view.scales_QG.shape)),), view.scales_QG),
        ]
    stored = packed.stored(name, *view.shape)
    places = tuple(place(part, stored[part][1]) for part in (words, scale))
    return [Piece(places, partial(_put_dequantized, packed, name, view))]


def _put_dequantized(
    packed: PackedFormat, name: str, out_QP: Tensor, words: Tensor, scales: Tensor
) -> None:
    stored = dict(zip(names_of(name), (words, scales), strict=False))
    read_plain(lambda part, out: out.copy_(stored[part]), name, packed, out_QP)


def _flip_sign(view: SlotView) -> None:
    view.values.view(torch.uint8).bitwise_xor_(INT8_SIGN)


def slot_view(matrices: QuantizedMatrices, slot: int) -> SlotView:
    """Return a whole matrix to write into."""
    return SlotView(matrices.values[slot], matrices.scales_SQG[slot])


def packed_name(name: str) -> str:
    """Return the name of the tensor that holds a matrix's values."""
    return f"{name}_packed"


def names_of(name: str) -> tuple[str, str, str]:
    """Return the names of the stored tensors of a matrix."""
    assert name.endswith("weight"), f"{name} is not the weight of a module"
    return packed_name(name), f"{name}_scale", f"{name}_shape"
