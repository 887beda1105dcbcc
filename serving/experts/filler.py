"""Slots for experts: which slot is taken, who leaves it, when its read begins and ends."""

from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from functools import partial

from ...kernels.values.quantized_weights import SlotWeights
from ...moe.folders.expert_layouts import ExpertViews
from .expectations import Expectations
from .policies.errors import wrong_victim
from .policies.policy import Key, Policy
from .pools import Pools
from .reads import Read, Reads
from .slots import Either, Elsewhere, Protected, Slots
from .tiers.tier import Tier
from .traffic import StoreStatistics


class SlotFiller:
    """Takes slots, fills them from a tier, and keeps the policy and the counters informed."""

    def __init__(
        self,
        memory: Sequence[SlotWeights],
        slots: Slots,
        expected: Expectations,
        policy: Policy,
        tier: Tier,
        reads: Reads,
        statistics: StoreStatistics,
    ) -> None:
        self._memory = memory
        self._slots = slots
        self._expected = expected
        self._protected = _protected_of(slots.pools, Protected(expected, slots))
        self._policy = policy
        self._tier = tier
        self._reads = reads
        self._statistics = statistics
        self._views: dict[tuple[int, int], ExpertViews] = {}
        """Of each pool and slot, once it was filled: making them takes as long as some reads."""
        self.num_ended = 0
        """Reads that were booked, or taken back."""
        self.likely: set[Key] = set()
        """Experts in memory that will perhaps be needed soon: they leave after the others."""

    def announce(self, layer: int, experts: Iterable[int]) -> None:
        """Let those that are neither in memory nor on their way wait for a slot."""
        for key in ((layer, expert) for expert in experts):
            if key not in self._slots and self._slots.filling(key) is None:
                self._expected.announce(key)

    def idle_slot(self, pool: int) -> int | None:
        """Return a free slot of a pool, or that of the expert that the policy puts out."""
        slot = self._slots.take_free(pool)
        if slot is not None:
            return slot
        protected = self._protected[pool]
        key = self._policy.victim(Either(self.likely, protected)) if self.likely else None
        if key is None:
            key = self._policy.victim(protected)
        if key is None:
            return None
        self._check(key, pool)
        return self._put_out(key)

    def slot_for_hint(self, pool: int, leaves: Callable[[Key], None]) -> int | None:
        """Return a slot for an expert that will perhaps be needed, if another one may leave.

        ``leaves`` hears which one does.
        """
        slot = self._slots.take_free(pool)
        if slot is not None:
            return slot
        key = self._policy.victim(Either(self.likely, self._protected[pool]))
        if key is None:
            return None
        self._check(key, pool)
        leaves(key)
        return self._put_out(key)

    def _check(self, key: Key, pool: int) -> None:
        if key in self._protected[pool] or key not in self._slots:
            # Its slot may be in use by compute, so going on could give wrong numbers.
            raise wrong_victim(self._policy, key)

    def slot_of_prefetch(self, pool: int) -> int | None:
        """Return the slot of the expert that is needed last, and announce that expert again."""
        for read in reversed(self._slots.all_filling()):
            if self._slots.pools.of(read.key) == pool and self._reads.cancel(read):
                if read.key in self._expected:
                    self._expected.announce_again(read.key)
                self._lose(read)
                return self._slots.give_up(read)
        for key in self._expected.last_first():
            if key in self._slots and self._slots.pools.of(key) == pool:
                self._expected.announce_again(key)
                return self._put_out(key)
        return None

    def drop(self, read: Read) -> None:
        """End an early read that is no longer wanted: now, or before its next part."""
        if self._reads.cancel(read):
            self._lose(read)
            self._slots.fail(read)
        else:
            self._reads.drop(read)

    def _lose(self, read: Read) -> None:
        self.num_ended += 1
        self._statistics.lose(read.key)
        self._policy.forget(read.key)

    def _put_out(self, key: Key) -> int:
        self.likely.discard(key)
        self._statistics.put_out(key)
        self._policy.forget(key)
        return self._slots.put_out(key)

    def clear(self, keys: Collection[Key]) -> list[Key]:
        """Free the slots of experts and end their reads; return those that were here or coming.

        Waits for reads under way to end, at their next part.
        """
        reads = [read for read in self._slots.all_filling() if read.key in keys]
        for read in reads:
            self.drop(read)
        running = [read for read in reads if self._slots.filling(read.key) is read]
        self._reads.wait_for_all(running)
        for read in running:
            self.book(read)
        here = [key for key in keys if key in self._slots]
        for key in here:
            self._slots.release(self._slots.pools.of(key), self._put_out(key))
        found = dict.fromkeys([*here, *(read.key for read in reads)])
        self.likely.difference_update(found)
        return list(found)

    def submit(self, key: Key, slot: int, is_urgent: bool) -> Read:
        pool = self._slots.pools.of(key)
        views = self._views.get((pool, slot))
        if views is None:
            views = self._views[pool, slot] = self._memory[pool].slot_views(slot)
        read = Read(key, slot, is_urgent, deque(), is_prefetch=not is_urgent)
        read.straight = self._tier.straight(key, views)
        if read.straight is None:
            read.take(self._tier.reads(key, views))
        else:
            read.begin = partial(self._tier.reads, key, views)
        self._slots.fill(read)
        self._policy.add(key)  # now and not when it arrives: the order does not depend on the disk
        self._reads.submit(read)
        return read

    def book_finished(self, wanted: Container[Key]) -> None:
        """Book the reads that are done, except those the caller waits for."""
        self._reads.look()
        for read in [read for read in self._slots.finished() if read.key not in wanted]:
            self.book(read)

    def book(self, read: Read) -> None:
        """Book a read that is done: its expert is resident now, or its slot is free again."""
        self.num_ended += 1
        if read.error is not None:
            self._slots.fail(read)
            self._policy.forget(read.key)
            self._statistics.lose(read.key)
            return
        self._slots.arrive(read)
        self._statistics.read(read.key, read.is_prefetch)


def _protected_of(pools: Pools, protected: Protected) -> list[Container[Key]]:
    """Return what may not leave its slot when a pool needs one: other pools' slots are no use."""
    if len(pools) == 1:
        return [protected]
    return [Either(protected, Elsewhere(pools, pool)) for pool in range(len(pools))]
