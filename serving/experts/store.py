"""The expert store: experts on disk, some of them in slots in memory. E experts per layer.

One pool of slots serves all layers. A policy (policies/) says which expert leaves its slot, a tier
(tiers.py) fills a slot, a queue (read_queue.py) runs the reads, and this file talks to compute.
Reads go straight into slots that nothing else uses, while the caller computes with experts that are
ready. Routers that choose early let the store read ahead. Reading ahead never puts out an expert
that is known to be needed, and waits behind every read that compute waits for.
"""

import time
from collections import deque
from collections.abc import Container, Generator, Sequence
from dataclasses import replace

import torch

from ...errors import ExpertReadError
from ...kernels.values.quantized_weights import SlotWeights
from ...moe.folders.expert_slots import empty_experts, expert_bytes
from ...moe.folders.folder import ModelFolder
from .budget import count_slots
from .expectations import Expectations
from .policies.errors import no_victim, wrong_victim
from .policies.lru import LeastRecentlyUsed
from .policies.policy import Key, Policy
from .read_queue import Read, ReadQueue
from .slots import Slots, StoreCounts
from .tiers import DiskTier, Tier
from .traffic import StoreStatistics


class ExpertStore:
    """Experts of a model folder behind ``num_slots`` slots. Used by one compute thread."""

    def __init__(
        self,
        folder: ModelFolder,
        dtype: torch.dtype,
        budget_bytes: int,
        num_threads: int = 4,
        policy: Policy | None = None,
    ) -> None:
        self.num_slots = count_slots(folder, dtype, budget_bytes)
        config, moe = folder.config, folder.config.moe
        assert moe is not None, "slots were counted"
        self.slot_bytes = expert_bytes(config, dtype, folder.packed)
        self._memory = empty_experts(config, self.num_slots, dtype, folder.packed)
        self._slots = Slots(self.num_slots, config.moe_layers, moe.num_experts)
        self._policy: Policy = LeastRecentlyUsed() if policy is None else policy
        self._tier: Tier = DiskTier(folder)
        self._reads = ReadQueue(num_threads)
        self._expected = Expectations()
        self.statistics = StoreStatistics(config.moe_layers, self.slot_bytes)

    def counts(self) -> StoreCounts:
        """Return what the slots are used for; any thread may ask."""
        filling = self._slots.all_filling()
        return StoreCounts(
            free=self._slots.num_free,
            filling=len(filling),
            resident=self._slots.num_resident,
            reading=sum(not read.is_done for read in filling),
            announced=self._expected.num_announced,
            expected=self._expected.num_expected,
        )

    def has(self, layer: int, expert: int) -> bool:
        """Say whether an expert is in memory."""
        return (layer, expert) in self._slots

    def close(self) -> None:
        """Stop the reading threads."""
        self._reads.close()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read what ``layer`` will need, and keep what is there already.

        Does not wait. As many reads begin as there are slots that nothing known needs; the others
        follow as slots come free.
        """
        self.keep(layer, experts)
        for expert in experts:
            key = (layer, expert)
            if key not in self._slots and self._slots.filling(key) is None:
                self._expected.announce(key)
        self._read_ahead()

    def keep(self, layer: int, experts: Sequence[int]) -> None:
        """Protect what is there of ``experts``: ``layer`` will need it."""
        for expert in experts:
            key = (layer, expert)
            self._expected.expect(key)
            self._policy.expect(key)

    def stream(
        self, layer: int, experts: Sequence[int]
    ) -> Generator[tuple[list[int], SlotWeights]]:
        """Yield all of ``experts`` in waves, each with weights that stay valid until the next.

        Resident experts come first, while the others are being read. Raises
        :class:`ExpertReadError` when reads fail for good; slots then stay consistent.
        """
        reading: dict[Key, Read] = {}
        try:
            ready, waiting = self._begin(layer, experts, reading)
            while ready or waiting or reading:
                self._book_finished(wanted=reading)
                self._read_now(layer, waiting, reading, can_wait=bool(ready))
                self._read_ahead()
                if ready:
                    yield ready, replace(self._memory, slot_of_E=self._slots.table(layer))
                    self._expected.drop((layer, expert) for expert in ready)
                    ready = []
                else:
                    ready = self._next_ready(layer, reading)
        except BaseException:
            self._expected.clear()  # this forward ends here
            raise
        finally:
            # Whatever ended the wave, no thread may write into a slot that is given away.
            self._reads.wait_for_all(reading.values())
            for read in reading.values():
                self._book(read)
        self._read_ahead()

    def _begin(
        self, layer: int, experts: Sequence[int], reading: dict[Key, Read]
    ) -> tuple[list[int], deque[int]]:
        """Return which experts are here and which must be read; make those under way urgent."""
        self._book_finished(wanted=reading)
        self._expected.drop_layer(layer)
        ready, waiting = [], deque[int]()
        for expert in experts:
            key = (layer, expert)
            self._expected.expect(key)
            self._policy.touch(key)
            read = self._slots.filling(key)
            if key in self._slots:
                ready.append(expert)
                self.statistics.hit(key)
            elif read is not None:
                reading[key] = read
                self._reads.make_urgent(read)
                self.statistics.late(key)
            else:
                waiting.append(expert)
                self.statistics.miss(key)
        return ready, waiting

    def _read_now(
        self, layer: int, waiting: deque[int], reading: dict[Key, Read], can_wait: bool
    ) -> None:
        """Begin reads that compute waits for; ``can_wait`` says that it has other work to do."""
        while waiting:
            slot = self._idle_slot()
            if slot is None and not (can_wait or reading):
                slot = self._slot_of_prefetch()
            if slot is None:
                return
            key = (layer, waiting.popleft())
            reading[key] = self._submit(key, slot, is_urgent=True)

    def _read_ahead(self) -> None:
        """Begin announced reads while there are slots that nothing known needs."""
        while self._expected.num_announced:
            slot = self._idle_slot()
            if slot is None:
                return
            key = self._expected.next_announced()
            self.statistics.prefetch(key)
            self._submit(key, slot, is_urgent=False)

    def _idle_slot(self) -> int | None:
        """Return a free slot, or that of the expert that the policy puts out."""
        slot = self._slots.take_free()
        if slot is not None:
            return slot
        key = self._policy.victim(self._expected)
        if key is None:
            return None
        if key in self._expected or key not in self._slots:
            # Its slot may be in use by compute, so going on could give wrong numbers.
            raise wrong_victim(self._policy, key)
        return self._put_out(key)

    def _slot_of_prefetch(self) -> int | None:
        """Return the slot of the expert that is needed last, and announce that expert again."""
        for read in reversed(self._slots.all_filling()):
            if self._reads.cancel(read):
                self.statistics.lose(read.key)
                self._expected.announce_again(read.key)
                return self._slots.give_up(read)
        for key in self._expected.last_first():
            if key in self._slots:
                self._expected.announce_again(key)
                return self._put_out(key)
        return None

    def _put_out(self, key: Key) -> int:
        self.statistics.put_out(key)
        self._policy.forget(key)
        return self._slots.put_out(key)

    def _submit(self, key: Key, slot: int, is_urgent: bool) -> Read:
        parts = deque(self._tier.reads(key, self._memory.slot_views(slot)))
        read = Read(key, slot, is_urgent, parts, is_prefetch=not is_urgent)
        self._slots.fill(read)
        self._reads.submit(read)
        return read

    def _next_ready(self, layer: int, reading: dict[Key, Read]) -> list[int]:
        """Wait for reads and return the experts that came.

        If none of ``reading`` is under way, wait until any prefetch is done and its slot usable.
        """
        if not (reading or self._slots.all_filling()):
            raise no_victim(self._policy)
        started = time.perf_counter()
        finished = self._reads.wait_for_any(reading.values() or self._slots.all_filling())
        self.statistics.layers[layer].stall_s += time.perf_counter() - started
        ready, failed = list[Read](), list[Read]()
        for read in finished:
            self._book(read)
            if reading.pop(read.key, None) is not None:
                (ready if read.error is None else failed).append(read)
        if failed:
            # The others under way are waited for in any case, so one error names all that failed.
            self._reads.wait_for_all(reading.values())
            failed += [read for read in reading.values() if read.error is not None]
            cause = failed[0].error
            raise ExpertReadError(
                f"an expert of layer {layer} could not be read ({cause}); try again later.",
                experts=(read.key[1] for read in failed),
            ) from cause
        return sorted(read.key[1] for read in ready)

    def _book_finished(self, wanted: Container[Key]) -> None:
        """Book the reads that are done, except those the caller waits for."""
        for read in [read for read in self._slots.finished() if read.key not in wanted]:
            self._book(read)

    def _book(self, read: Read) -> None:
        """Book a read that is done: its expert is resident now, or its slot is free again."""
        if read.error is not None:
            self._slots.fail(read)
            self.statistics.lose(read.key)
            return
        self._slots.arrive(read)
        self._policy.add(read.key)
        self.statistics.read(read.key, read.is_prefetch)
