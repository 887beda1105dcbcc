"""Keys and values of past tokens, one cache per sequence.

L positions, G key/value heads, H head width, V value width.
"""

from array import array
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.attention import BLOCK, Cache
from .kept_ids import KeptIds


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one layer stores per position."""

    num_kv_heads: int
    head_dim: int
    """Width of a key; for latent attention, of the row that is both key and value."""
    v_dim: int
    """Width of a value; 0 if it is a part of the key."""
    dtype: torch.dtype


class KVCache(Cache, Protocol):
    """The interface of the cache of one sequence, over all layers.

    ``length`` is advanced once per forward, after the last layer. ``reserve`` raises and changes
    nothing where there is no room.
    """

    @property
    def capacity(self) -> int:
        """Positions there is memory for."""
        ...

    def spec(self, layer: int) -> KVCacheSpec:
        """Say what ``layer`` keeps per position."""
        ...

    def append(self, layer: int, keys_GLH: Tensor, values_GLV: Tensor) -> None:
        """Store the positions of ``layer`` that follow ``length``."""
        ...

    def write(self, layer: int, start: int, keys_GLH: Tensor, values_GLV: Tensor) -> None:
        """Store the positions of ``layer`` from ``start`` on, for which there is room."""
        ...

    def keep_ids(self, ids_L: Tensor) -> None:
        """Store the token ids of the positions that follow ``length``, for :meth:`last_id`."""
        ...

    def last_id(self) -> Tensor:
        """Return the token id of the last position, int64 scalar; only if ids were kept."""
        ...

    def id_at(self, position: int) -> Tensor:
        """Return the token id of a position, int64 scalar; only if ids were kept."""
        ...

    def view(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the first ``end`` keys of ``layer``, ``[G, end, H]``, and their values."""
        ...


class SequenceCache:
    """A :class:`KVCache` in contiguous memory; grows by doubling up to ``max_length``."""

    def __init__(self, specs: list[KVCacheSpec], max_length: int, device: torch.device) -> None:
        self.length = 0
        """Positions stored; advanced once per forward, after the last layer."""
        self._specs = specs
        self._max_length = max_length
        self._device = device
        self.capacity = 0
        """Positions there is memory for."""
        self.addresses = array("q")
        """Addresses of that memory: keys, then values, of each layer."""
        self.table = array("q")
        """Blocks of that memory, one after the other."""
        self.is_int8 = False
        """Keys and values have the model's type."""
        self._keys_GLH: list[Tensor] = []
        self._values_GLV: list[Tensor] = []
        self._ids = KeptIds(device)

    def spec(self, layer: int) -> KVCacheSpec:
        """Say what ``layer`` keeps per position."""
        return self._specs[layer]

    @property
    def head_positions(self) -> int:
        """Positions in a head's memory."""
        return self.capacity

    def append(self, layer: int, keys_GLH: Tensor, values_GLV: Tensor) -> None:
        """Store the positions of ``layer`` that follow ``length``."""
        self.reserve(keys_GLH.shape[1])
        self.write(layer, self.length, keys_GLH, values_GLV)

    def write(self, layer: int, start: int, keys_GLH: Tensor, values_GLV: Tensor) -> None:
        """Store the positions of ``layer`` from ``start`` on, for which there is room."""
        end = start + keys_GLH.shape[1]
        self._keys_GLH[layer][:, start:end] = keys_GLH
        self._values_GLV[layer][:, start:end] = values_GLV

    def keep_ids(self, ids_L: Tensor) -> None:
        """Store the token ids of the positions that follow ``length``, for :meth:`last_id`."""
        self._ids.keep(self.length, ids_L)

    def last_id(self) -> Tensor:
        """Return the token id of the last position, int64 scalar; only if ids were kept."""
        return self.id_at(self.length - 1)

    def id_at(self, position: int) -> Tensor:
        """Return the token id of a position, int64 scalar; only if ids were kept."""
        return self._ids.at(position)

    def view(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the first ``end`` keys of ``layer``, ``[G, end, H]``, and their values."""
        return self._keys_GLH[layer][:, :end], self._values_GLV[layer][:, :end]

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more positions.

        Without enough memory, the allocator's error is raised and the cache is unchanged.
        """
        if self.length + count > self.capacity:
            self._grow(self.length + count)

    def copy(self) -> "SequenceCache":
        """Return a cache with the same keys and values, and without the ids."""
        copy = SequenceCache(self._specs, self._max_length, self._device)
        copy.reserve(self.length)
        for layer in range(len(self._specs)):
            copy.write(layer, 0, *self.view(layer, self.length))
        copy.length = self.length
        return copy

    def _grow(self, needed: int) -> None:
        if needed > self._max_length:  # not an assertion: kernels write without a check
            raise IndexError(f"{needed} positions in a cache for {self._max_length}")
        capacity = min(self._max_length, max(64, needed, 2 * self.capacity))
        keys_GLH = self._grown(self._keys_GLH, [s.head_dim for s in self._specs], capacity)
        values_GLV = self._grown(self._values_GLV, [s.v_dim for s in self._specs], capacity)
        # Only now, so that the cache is unchanged if memory runs out.
        self.capacity, self._keys_GLH, self._values_GLV = capacity, keys_GLH, values_GLV
        pairs = zip(keys_GLH, values_GLV, strict=True)
        self.addresses = array("q", (buffer.data_ptr() for pair in pairs for buffer in pair))
        self.table = array("q", range(-(-capacity // BLOCK)))

    def _grown(self, old: list[Tensor], widths: list[int], capacity: int) -> list[Tensor]:
        """Return larger buffers, one per layer, with the stored positions."""
        grown = []
        for layer, (spec, width) in enumerate(zip(self._specs, widths, strict=True)):
            shape = (spec.num_kv_heads, capacity, width)
            new = torch.empty(shape, dtype=spec.dtype, device=self._device)
            if old:
                new[:, : self.length] = old[layer][:, : self.length]
            grown.append(new)
        return grown


class CachePosition:
    """A :class:`KVCache` that ends before one of the next positions of another one.

    Several new positions of a text then run as sequences of one row that share a cache: each has
    the bits of a single step, and layers store them in order before they attend. Room for all of
    them, and their ids, must be in the cache already.
    """

    def __init__(self, whole: KVCache, length: int) -> None:
        self.length = length
        """Positions before this one."""
        self._whole = whole
        self.capacity = whole.capacity
        """Positions there is memory for."""
        self.addresses, self.table = whole.addresses, whole.table
        """Where that memory is."""
        self.head_positions, self.is_int8 = whole.head_positions, whole.is_int8
        """How it is laid out."""

    def spec(self, layer: int) -> KVCacheSpec:
        """Say what ``layer`` keeps per position."""
        return self._whole.spec(layer)

    def reserve(self, count: int) -> None:
        """Raise if there is no room for ``count`` more positions."""
        if self.length + count > self.capacity:
            raise IndexError(f"{self.length + count} positions in a cache for {self.capacity}")

    def append(self, layer: int, keys_GLH: Tensor, values_GLV: Tensor) -> None:
        """Store this position of ``layer``."""
        self.reserve(keys_GLH.shape[1])
        self.write(layer, self.length, keys_GLH, values_GLV)

    def write(self, layer: int, start: int, keys_GLH: Tensor, values_GLV: Tensor) -> None:
        """Store positions of ``layer`` from ``start`` on."""
        self._whole.write(layer, start, keys_GLH, values_GLV)

    def keep_ids(self, ids_L: Tensor) -> None:
        """Nothing: the cache has them."""

    def last_id(self) -> Tensor:
        """Return the token id of the position before, int64 scalar; only if ids were kept."""
        return self.id_at(self.length - 1)

    def id_at(self, position: int) -> Tensor:
        """Return the token id of a position, int64 scalar; only if ids were kept."""
        return self._whole.id_at(position)

    def view(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the first ``end`` keys of ``layer``, ``[G, end, H]``, and their values."""
        return self._whole.view(layer, end)

    @property
    def text(self) -> KVCache:
        """The cache of the whole text."""
        return self._whole
