"""Keys and values in blocks of a fixed size that many sequences share.

Who owns the blocks decides which sequence has which; nothing here allocates or frees any.

N blocks, G key/value heads, H head width, V value width, L new positions, S positions.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..kernels.attention import BLOCK as BLOCK
from .kept_ids import KeptIds
from .kv_cache import KVCacheSpec

KVDtype = Literal["int8"]
"""Type of stored keys and values, if it is not the model's."""
SCALE_BYTES = 4


def bytes_per_block(specs: Sequence[KVCacheSpec], dtype: KVDtype | None = None) -> int:
    """Return the bytes of one block in all layers."""
    total = 0
    for spec in specs:
        for width in filter(None, (spec.head_dim, spec.v_dim)):
            row = width * spec.dtype.itemsize if dtype is None else width + SCALE_BYTES
            total += BLOCK * spec.num_kv_heads * row
    return total


class KVBlocks:
    """The memory of ``num_blocks`` blocks; a block's id is valid in every layer.

    With ``int8``, each position and head has integers and an fp32 scale, computed from its own
    numbers alone. Blocks are not cleared. The allocator's error is raised if there is not enough
    memory.
    """

    def __init__(
        self,
        specs: Sequence[KVCacheSpec],
        num_blocks: int,
        device: torch.device,
        dtype: KVDtype | None = None,
    ) -> None:
        self.specs = tuple(specs)
        self.num_blocks = num_blocks
        self.device = device
        self.is_int8 = dtype == "int8"
        # Heads first: memory of one head is then like that of a long sequence without blocks.
        self.layers = [
            (
                self._rows(spec, spec.head_dim),
                self._rows(spec, spec.v_dim),
                *([self._scales(spec, spec.head_dim)] if self.is_int8 else []),
                *([self._scales(spec, spec.v_dim)] if self.is_int8 else []),
            )
            for spec in specs
        ]
        """By layer: keys ``[G, N, BLOCK, H]`` and values ``[G, N, BLOCK, V]``; then, in int8, the
        scales of both, ``[G, N, BLOCK]``."""
        self.addresses = array("q", (part.data_ptr() for part in self.tensors))
        """Addresses of these tensors, for kernels."""

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors of all layers."""
        return [part for layer in self.layers for part in layer]

    def _rows(self, spec: KVCacheSpec, width: int) -> Tensor:
        shape = (spec.num_kv_heads, self.num_blocks, BLOCK, width)
        dtype = torch.int8 if self.is_int8 else spec.dtype
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _scales(self, spec: KVCacheSpec, width: int) -> Tensor:
        num_blocks = self.num_blocks if width else 0
        shape = (spec.num_kv_heads, num_blocks, BLOCK)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def copy(self, source: int, target: int) -> None:
        """Copy a block's keys and values of every layer to another block."""
        for part in self.tensors:
            if part.shape[1]:
                part[:, target] = part[:, source]

    def write(self, layer: int, blocks_L: Tensor, places_L: Tensor, new: Sequence[Tensor]) -> None:
        """Store keys and values, ``[G, L, width]``, at places of blocks."""
        for kind, (part, rows_GLH) in enumerate(zip(self.layers[layer][:2], new, strict=True)):
            if self.is_int8 and rows_GLH.shape[-1]:
                rows_GLH, scales_GL = rounded(rows_GLH)
                self.layers[layer][2 + kind][:, blocks_L, places_L] = scales_GL
            part[:, blocks_L, places_L] = rows_GLH.to(part.dtype)

    def read(self, layer: int, blocks_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values of blocks, ``[G, n * BLOCK, width]``."""
        keys, values = (part[:, blocks_n].flatten(1, 2) for part in self.layers[layer][:2])
        if self.is_int8:
            dtype = self.specs[layer].dtype
            scales = [
                part[:, blocks_n].flatten(1) for part in self.layers[layer][2:] if len(part[0])
            ]
            keys = (keys * scales[0].unsqueeze(-1)).to(dtype)
            values = (values * scales[-1].unsqueeze(-1)).to(dtype)
        return keys, values


def rounded(rows_GLH: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row as integers up to 127, ``[G, L, H]``, and its fp32 scale, ``[G, L]``."""
    wide_GLH = rows_GLH.float()
    scales_GL = wide_GLH.abs().amax(dim=-1) / 127
    units_GLH = (wide_GLH / scales_GL.clamp(min=1e-30).unsqueeze(-1)).nan_to_num()
    return units_GLH.round().clamp(-127, 127).to(torch.int8), scales_GL


class BlockCache:
    """A :class:`~moeyard.moe.kv_cache.KVCache` of one sequence, in blocks of a shared memory.

    Position p is in block ``blocks[p // BLOCK]``. To go on after positions that another sequence
    has computed: add their blocks, keep their ids, and set ``length``. To go back, set ``length``;
    positions from there on are written again, so their blocks must not be shared.
    """

    def __init__(self, memory: KVBlocks, max_length: int) -> None:
        self.length = 0
        """Positions stored; advanced once per forward, after the last layer."""
        self.memory = memory
        self.blocks: array[int] = array("q")
        """Ids of the sequence's blocks, in the order of positions."""
        self._max_length = max_length
        self._ids = KeptIds(memory.device)

    @property
    def capacity(self) -> int:
        """Positions there is memory for."""
        return len(self.blocks) * BLOCK

    @property
    def addresses(self) -> "array[int]":
        """Addresses of the memory of all sequences: keys, then values, of each layer."""
        return self.memory.addresses

    @property
    def table(self) -> "array[int]":
        """The sequence's blocks."""
        return self.blocks

    @property
    def head_positions(self) -> int:
        """Positions in a head's memory."""
        return self.memory.num_blocks * BLOCK

    @property
    def is_int8(self) -> bool:
        """Whether keys and values are integers with scales; else they have the model's type."""
        return self.memory.is_int8

    def add_blocks(self, ids: Iterable[int]) -> None:
        """Append blocks, which hold the positions from ``capacity`` on.

        Raises :class:`IndexError` for ids that the memory does not have, and adds none then.
        """
        new = array("q", ids)
        for block in new:
            if not 0 <= block < self.memory.num_blocks:  # kernels write without a check
                raise IndexError(f"block {block} of a memory of {self.memory.num_blocks}")
        self.blocks.extend(new)

    def spec(self, layer: int) -> KVCacheSpec:
        """Say what ``layer`` keeps per position."""
        return self.memory.specs[layer]

    def reserve(self, count: int) -> None:
        """Raise :class:`IndexError` unless there are blocks for ``count`` more positions."""
        needed = self.length + count
        if needed > self._max_length:
            raise IndexError(f"{needed} positions in a cache for {self._max_length}")
        if needed > self.capacity:
            raise IndexError(f"{needed} positions in a cache with {len(self.blocks)} blocks")

    def append(self, layer: int, keys_GLH: Tensor, values_GLV: Tensor) -> None:
        """Store the positions of ``layer`` that follow ``length``."""
        self.reserve(keys_GLH.shape[1])
        self.write(layer, self.length, keys_GLH, values_GLV)

    def write(self, layer: int, start: int, keys_GLH: Tensor, values_GLV: Tensor) -> None:
        """Store the positions of ``layer`` from ``start`` on, for which there are blocks."""
        positions_L = torch.arange(start, start + keys_GLH.shape[1])
        blocks_L = self._table()[positions_L // BLOCK].to(self.memory.device)
        places_L = (positions_L % BLOCK).to(self.memory.device)
        self.memory.write(layer, blocks_L, places_L, (keys_GLH, values_GLV))

    def keep_ids(self, ids_L: Tensor) -> None:
        """Store the token ids of the positions that follow ``length``, for :meth:`last_id`."""
        self._ids.keep(self.length, ids_L)

    def last_id(self) -> Tensor:
        """Return the token id of the last position, int64 scalar; only if ids were kept."""
        return self._ids.at(self.length - 1)

    def id_at(self, position: int) -> Tensor:
        """Return the token id of a position, int64 scalar; only if ids were kept."""
        return self._ids.at(position)

    def view(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Return copies of the first ``end`` keys of ``layer``, ``[G, end, H]``, and values."""
        blocks_n = self._table()[: -(-end // BLOCK)].to(self.memory.device)
        keys_GSH, values_GSV = self.memory.read(layer, blocks_n)
        return keys_GSH[:, :end], values_GSV[:, :end]

    def _table(self) -> Tensor:
        return torch.tensor(self.blocks, dtype=torch.int64, device="cpu")
