"""Keys and values in blocks of a fixed size that many sequences share.

Who owns the blocks decides which sequence has which; nothing here allocates or frees any.

N blocks, G key/value heads, H head width, V value width, L new positions, S positions.
"""

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .kept_ids import KeptIds
from .kv_cache import KVCacheSpec

BLOCK = 16
"""Positions in a block."""


def bytes_per_block(specs: Sequence[KVCacheSpec]) -> int:
    """Return the bytes of one block in all layers."""
    return sum(
        BLOCK * spec.num_kv_heads * (spec.head_dim + spec.v_dim) * spec.dtype.itemsize
        for spec in specs
    )


class KVBlocks:
    """The memory of ``num_blocks`` blocks; a block's id is valid in every layer.

    Blocks are not cleared. The allocator's error is raised if there is not enough memory.
    """

    def __init__(self, specs: Sequence[KVCacheSpec], num_blocks: int, device: torch.device) -> None:
        self.specs = tuple(specs)
        self.num_blocks = num_blocks
        self.device = device
        # Heads first: memory of one head is then like that of a long sequence without blocks.
        self.keys_GNLH = [self._empty(spec, spec.head_dim) for spec in specs]
        """By layer: ``[G, N, BLOCK, H]``."""
        self.values_GNLV = [self._empty(spec, spec.v_dim) for spec in specs]
        """By layer: ``[G, N, BLOCK, V]``."""
        pairs = zip(self.keys_GNLH, self.values_GNLV, strict=True)
        self.addresses = array("q", (part.data_ptr() for pair in pairs for part in pair))
        """Addresses of that memory, for kernels: keys, then values, of each layer."""

    def _empty(self, spec: KVCacheSpec, width: int) -> Tensor:
        shape = (spec.num_kv_heads, self.num_blocks, BLOCK, width)
        return torch.empty(shape, dtype=spec.dtype, device=self.device)

    def copy(self, source: int, target: int) -> None:
        """Copy a block's keys and values of every layer to another block."""
        for memory in (*self.keys_GNLH, *self.values_GNLV):
            memory[:, target] = memory[:, source]


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
        num_new = keys_GLH.shape[1]
        self.reserve(num_new)
        positions_L = torch.arange(self.length, self.length + num_new)
        blocks_L = self._table()[positions_L // BLOCK].to(self.memory.device)
        places_L = (positions_L % BLOCK).to(self.memory.device)
        self.memory.keys_GNLH[layer][:, blocks_L, places_L] = keys_GLH
        self.memory.values_GNLV[layer][:, blocks_L, places_L] = values_GLV

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
        memory = self.memory.keys_GNLH[layer], self.memory.values_GNLV[layer]
        keys, values = (part[:, blocks_n].flatten(1, 2)[:, :end] for part in memory)
        return keys, values

    def _table(self) -> Tensor:
        return torch.tensor(self.blocks, dtype=torch.int64, device="cpu")
