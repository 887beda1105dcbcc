"""Which expert is in which slot. E experts of a layer."""

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from .expectations import Expectations
from .policies.policy import Key
from .pools import Pools
from .reads import Read


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """What the slots are used for now, and what is known to be needed."""

    free: int
    filling: int
    """Slots that a read fills, or has filled without being booked yet."""
    resident: int
    reading: int
    """Reads that are not done."""
    announced: int
    """Experts that will be read ahead as soon as there is a slot."""
    expected: int
    """Experts that are protected because compute will need them."""


class Slots:
    """Slots for experts of all layers. Each slot is free, being filled, or holds an expert.

    Slots are numbered from 0 in each pool, and an expert has slots in one pool only. Keeps the
    books: it neither reads nor decides. A layer's table is kept ready, because every forward asks
    for it.
    """

    def __init__(self, pools: Pools, layers: Iterable[int], num_experts: int) -> None:
        self.pools = pools
        self._free = [deque(range(num_slots)) for num_slots in pools.num_slots]
        self._filling: dict[Key, Read] = {}
        self._slot_of_E = {
            (pool, layer): [-1] * num_experts for layer in layers for pool in range(len(pools))
        }
        self.resident: set[Key] = set()
        """Experts that are in a slot, whole; others only look."""

    def num_free(self, pool: int) -> int:
        """Return how many slots of a pool nothing uses."""
        return len(self._free[pool])

    @property
    def num_resident(self) -> int:
        """Slots that hold an expert."""
        return len(self.resident)

    def counts(self, expected: Expectations) -> StoreCounts:
        """Return what the slots are used for; any thread may ask."""
        filling = self.all_filling()
        return StoreCounts(
            free=sum(map(len, self._free)),
            filling=len(filling),
            resident=self.num_resident,
            reading=sum(not read.is_done for read in filling),
            announced=expected.num_announced,
            expected=expected.num_expected,
        )

    def __contains__(self, key: Key) -> bool:
        """Say whether an expert is in a slot, whole."""
        return key in self.resident

    def table(self, layer: int, pool: int) -> Sequence[int]:
        """Return the slot of each expert of a layer, -1 for those that are not in this pool.

        It follows what comes and leaves.
        """
        return self._slot_of_E[pool, layer]

    def filling(self, key: Key) -> Read | None:
        """Return the read that brings an expert, if there is one."""
        return self._filling.get(key)

    def is_filling(self, key: object) -> bool:
        """Say whether a read brings an expert."""
        return key in self._filling

    def all_filling(self) -> list[Read]:
        """Return the reads that fill slots, in the order they began."""
        return list(self._filling.values())

    def finished(self) -> Iterator[Read]:
        """Yield the reads that are done, and whose slots are still booked as being filled."""
        for read in self._filling.values():
            if read.is_done:
                yield read

    def take_free(self, pool: int) -> int | None:
        """Take a free slot, if there is one. The caller fills it."""
        return self._free[pool].popleft() if self._free[pool] else None

    def fill(self, read: Read) -> None:
        """Book a read's slot as being filled."""
        self._filling[read.key] = read

    def arrive(self, read: Read) -> None:
        """Book a read's slot as holding its expert."""
        layer, expert = read.key
        del self._filling[read.key]
        self._slot_of_E[self.pools.of(read.key), layer][expert] = read.slot
        self.resident.add(read.key)

    def fail(self, read: Read) -> None:
        """Book a read's slot as free."""
        self._free[self.pools.of(read.key)].append(self.give_up(read))

    def give_up(self, read: Read) -> int:
        """Take the slot of a read that will not happen."""
        del self._filling[read.key]
        return read.slot

    def put_out(self, key: Key) -> int:
        """Take the slot of an expert."""
        layer, expert = key
        slot_of_E = self._slot_of_E[self.pools.of(key), layer]
        slot = slot_of_E[expert]
        assert slot >= 0, f"{key} is in no slot"
        slot_of_E[expert] = -1
        self.resident.remove(key)
        return slot

    def release(self, pool: int, slot: int) -> None:
        """Book a slot that was taken as free again."""
        self._free[pool].append(slot)


class Protected:
    """The experts that may not leave: compute will need them, or their reads are under way."""

    def __init__(self, expected: Expectations, slots: Slots) -> None:
        self._expected = expected
        self._slots = slots

    def __contains__(self, key: object) -> bool:
        return key in self._expected or self._slots.is_filling(key)


class Elsewhere:
    """The experts whose slots are not in a pool."""

    def __init__(self, pools: Pools, pool: int) -> None:
        self._pools = pools
        self._pool = pool

    def __contains__(self, key: object) -> bool:
        return self._pools.pool_of.get(cast(Key, key), 0) != self._pool


class Either:
    """What one of two containers has."""

    def __init__(self, first: Container[Key], second: Container[Key]) -> None:
        self._first = first
        self._second = second

    def __contains__(self, key: object) -> bool:
        return key in self._first or key in self._second
