"""Slots by size: experts of one width share a pool, and a slot never changes its pool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...moe.folders.expert_slots import expert_bytes
from ...moe.folders.folder import ModelFolder
from .policies.policy import Key


class PoolSize(NamedTuple):
    """What a pool may have to hold."""

    num_experts: int
    """Of all layers, of this width."""
    slot_bytes: int
    """One expert."""


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools of a store. Most models have one."""

    num_slots: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    pool_of: Mapping[Key, int] = field(default_factory=dict)
    """The pool of each expert; empty if there is one pool."""

    def __len__(self) -> int:
        """Return how many pools there are."""
        return len(self.num_slots)

    def of(self, key: Key) -> int:
        """Return the pool of an expert."""
        return self.pool_of.get(key, 0)

    def bytes_of(self, key: Key) -> int:
        """Return the bytes of an expert."""
        return self.slot_bytes[self.pool_of.get(key, 0)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return bytes_of_slots(self.num_slots, self.slot_bytes)


def pool_sizes(folder: ModelFolder, dtype: torch.dtype) -> tuple[PoolSize, ...]:
    """Return a folder's pools, the widest experts first; none for a model without experts."""
    config = folder.config
    if config.moe is None:
        return ()
    counts = folder.formats.counts(config)
    sizes = (expert_bytes(config, dtype, packed) for packed in folder.formats.kinds)
    return tuple(map(PoolSize, counts, sizes))


def divide_slots(sizes: Sequence[PoolSize], budget_bytes: int) -> tuple[int, ...]:
    """Return how many slots each pool gets within a budget, all 0 if not one of each fits.

    Each next slot goes to the pool that holds the smallest share of its experts, as long as it
    fits. So bytes are divided as the experts' bytes are, and what a larger slot leaves over goes
    to smaller ones.
    """
    if sum(size.slot_bytes for size in sizes) > budget_bytes:
        return (0,) * len(sizes)
    if len(sizes) == 1:
        return (min(sizes[0].num_experts, budget_bytes // sizes[0].slot_bytes),)
    num_slots = [1] * len(sizes)
    left = budget_bytes - sum(size.slot_bytes for size in sizes)
    while True:
        growing = [
            pool
            for pool, size in enumerate(sizes)
            if num_slots[pool] < size.num_experts and size.slot_bytes <= left
        ]
        if not growing:
            return tuple(num_slots)
        pool = min(growing, key=lambda pool: num_slots[pool] / sizes[pool].num_experts)
        num_slots[pool] += 1
        left -= sizes[pool].slot_bytes


def bytes_of_slots(num_slots: Sequence[int], slot_bytes: Sequence[int]) -> int:
    """Return the bytes of the slots of all pools."""
    return sum(count * size for count, size in zip(num_slots, slot_bytes, strict=True))
