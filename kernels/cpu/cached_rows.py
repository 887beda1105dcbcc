"""Attention of new rows to what their sequences have in their caches, on the C++ kernels.

T rows of all sequences, Q query heads, G key/value heads, H key width, V value width.
"""

import ctypes
from array import array
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .library import TYPES, address, functions_for
from .structures import AttendArguments, CachedRows

BLOCK = 16
"""Positions in a block of keys and values: ``KV_BLOCK`` of arguments.h."""


class Cache(Protocol):
    """The keys and values of one sequence over all layers."""

    length: int
    """Positions stored."""

    @property
    def addresses(self) -> "array[int]":
        """Addresses for each layer of keys and of values, ``[G, head_positions, width]`` each.

        If ``is_int8``, then those of the fp32 scales of both, ``[G, head_positions]``, follow.
        """
        ...

    @property
    def table(self) -> "array[int]":
        """The block of positions 0 to BLOCK - 1, of the next BLOCK, and so on."""
        ...

    @property
    def head_positions(self) -> int:
        """Positions in a head's memory."""
        ...

    @property
    def is_int8(self) -> bool:
        """Whether keys and values are integers with scales; else they have the model's type."""
        ...

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more positions."""
        ...


class NewRows:
    """The caches of a step's sequences, with room for the rows that each of them adds."""

    def __init__(self, caches: Sequence[Cache], counts: Sequence[int]) -> None:
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve(count)
        # Arrays are kept because the structure has their addresses only.
        self._memory = [(cache.addresses, cache.table) for cache in caches]
        self._arrays = {
            "caches": array("q", (memory.buffer_info()[0] for memory, _ in self._memory)),
            "tables": array("q", (table.buffer_info()[0] for _, table in self._memory)),
            "lengths": array("q", (cache.length for cache in caches)),
            "counts": array("q", counts),
            "capacities": array("q", (cache.head_positions for cache in caches)),
            "are_int8": array("q", (cache.is_int8 for cache in caches)),
        }
        addresses = {name: values.buffer_info()[0] for name, values in self._arrays.items()}
        self._structure = CachedRows(sequences=len(caches), rows=sum(counts), **addresses)
        self.address = ctypes.addressof(self._structure)
        """Of the structure that the kernels read, as long as this object lives."""


def fits_kernels(key_width: int, dtype: torch.dtype) -> bool:
    """Say whether the kernels support keys of this width: they multiply bf16 in pairs."""
    return dtype == torch.float32 or key_width % 2 == 0


def attend_cached(
    q_TQH: Tensor,
    k_TGH: Tensor,
    v_TGV: Tensor | None,
    new: NewRows,
    layer: int,
    *,
    scale: float,
    window: int | None = None,
    sinks_Q: Tensor | None = None,
    value_width: int | None = None,
) -> Tensor | None:
    """Return each new row's attention over its sequence, ``[T, Q, V]``; None if it cannot be run.

    Stores keys and values in the caches, which count them once the forward is over. Without ``v``,
    a value is the first ``value_width`` elements of the key. ``window`` is how many positions a
    query sees, its own included; None = all. ``sinks`` are logits without values.
    """
    q_TQH, k_TGH = q_TQH.contiguous(), k_TGH.contiguous()
    v_TGV = None if v_TGV is None else v_TGV.contiguous()
    present = [part for part in (q_TQH, k_TGH, v_TGV, sinks_Q) if part is not None]
    functions = functions_for(*present)
    num_rows, num_heads, key_width = q_TQH.shape
    if functions is None or not fits_kernels(key_width, q_TQH.dtype):
        return None
    width = value_width if v_TGV is None else v_TGV.shape[-1]
    assert width is not None, "the width of values is not known"
    out_TQV = q_TQH.new_empty(num_rows, num_heads, width)
    arguments = AttendArguments(
        to=new.address,
        layer=layer,
        threads=torch.get_num_threads(),
        type=TYPES[q_TQH.dtype],
        num_heads=num_heads,
        num_kv_heads=k_TGH.shape[1],
        key_width=key_width,
        value_width=width,
        values_in_keys=v_TGV is None,
        window=window or 0,
        scale=scale,
        q=q_TQH.data_ptr(),
        k=k_TGH.data_ptr(),
        v=address(v_TGV),
        sinks=address(sinks_Q),
        out=out_TQV.data_ptr(),
    )
    functions.moeyard_attend(ctypes.byref(arguments))
    return out_TQV
