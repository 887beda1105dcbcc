"""The expert store: experts on disk, some of them in slots in memory.

S slots, E experts per layer, F expert width, D model width.

One pool of slots serves all layers, least recently used first out. Reads go straight into slots
that nothing else uses, while the caller computes with experts that are ready. Routers that choose
early let the store read ahead: such reads never put out what is already known to be needed, and
wait behind everything compute is waiting for.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import replace
from functools import partial

import torch

from ...errors import ConfigError, ExpertReadError
from ...kernels.values.quantized_weights import SlotWeights
from ...moe.folders.expert_slots import empty_experts, expert_bytes
from ...moe.folders.folder import ModelFolder
from .read_queue import Key, Read, ReadQueue
from .traffic import LayerTraffic, StoreStatistics

READ_ATTEMPTS = 3
RETRY_PAUSE_S = 0.05


class ExpertStore:
    """Experts of a model folder behind ``num_slots`` slots. Used by one compute thread."""

    def __init__(
        self,
        folder: ModelFolder,
        dtype: torch.dtype,
        budget_bytes: int,
        num_threads: int = 4,
    ) -> None:
        self.num_slots = count_slots(folder, dtype, budget_bytes)
        config, moe = folder.config, folder.config.moe
        assert moe is not None, "slots were counted"
        self._folder = folder
        self._num_experts = moe.num_experts
        layers = config.moe_layers
        self.slot_bytes = expert_bytes(config, dtype, folder.packed)
        self._slots = empty_experts(config, self.num_slots, dtype, folder.packed)
        self._free = deque(range(self.num_slots))
        self._resident: OrderedDict[Key, int] = OrderedDict()
        self._loading: dict[Key, Read] = {}
        self._announced: deque[Key] = deque()
        """Needed soon, not in memory, and no slot yet; in the order of need."""
        self._expected: set[Key] = set()
        """Needed soon; put out only when compute cannot go on otherwise."""
        self._unused: set[Key] = set()
        """Prefetched, read or being read, and not needed so far."""
        self._reads = ReadQueue(num_threads)
        self.statistics = StoreStatistics(layers={layer: LayerTraffic() for layer in layers})

    @property
    def num_resident(self) -> int:
        """Experts in memory now."""
        return len(self._resident)

    def close(self) -> None:
        """Stop the reading threads."""
        self._reads.close()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read what ``layer`` will need, and keep what is there already.

        Returns at once. As many reads begin as there are slots that nothing known needs; the others
        follow as slots come free.
        """
        self.keep(layer, experts)
        for expert in experts:
            key = (layer, expert)
            if not (key in self._resident or key in self._loading or key in self._announced):
                self._announced.append(key)
        self._read_ahead()

    def keep(self, layer: int, experts: Sequence[int]) -> None:
        """Protect what is there of ``experts``: ``layer`` will need it."""
        for expert in experts:
            key = (layer, expert)
            self._expected.add(key)
            if key in self._resident:
                self._resident.move_to_end(key)

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
                self._settle_finished(wanted=reading)
                self._read_now(layer, waiting, reading, can_wait=bool(ready))
                self._read_ahead()
                if ready:
                    yield ready, self._weights(layer)
                    self._expected.difference_update((layer, expert) for expert in ready)
                    ready = []
                else:
                    ready = self._next_ready(layer, reading)
        except BaseException:
            self._announced.clear()  # this forward has come to its end, so nothing is sure now
            self._expected.clear()
            raise
        finally:
            # Whatever ended the wave, no thread may write into a slot that is given away.
            self._reads.wait_for_all(reading.values())
            for read in reading.values():
                self._settle(read)
        self._read_ahead()

    def _begin(
        self, layer: int, experts: Sequence[int], reading: dict[Key, Read]
    ) -> tuple[list[int], deque[int]]:
        """Return which experts are here and which must be read; those under way go on faster."""
        self._settle_finished(wanted=reading)
        self._expected = {key for key in self._expected if key[0] != layer}
        traffic = self.statistics.layers[layer]
        ready, waiting = [], deque[int]()
        for expert in experts:
            key = (layer, expert)
            self._expected.add(key)
            was_prefetched = key in self._unused
            self._unused.discard(key)
            if key in self._resident:
                self._resident.move_to_end(key)
                ready.append(expert)
                traffic.hits += 1
                traffic.prefetch_useful += was_prefetched
            elif key in self._loading:
                reading[key] = self._loading[key]
                self._reads.make_urgent(reading[key])
                traffic.prefetch_late += 1
            else:
                waiting.append(expert)
                traffic.misses += 1
        self._announced = deque(key for key in self._announced if key[0] != layer)
        return ready, waiting

    def _weights(self, layer: int) -> SlotWeights:
        slots = tuple(self._resident.get((layer, e), -1) for e in range(self._num_experts))
        return replace(self._slots, slot_of_E=slots)

    def _read_now(
        self, layer: int, waiting: deque[int], reading: dict[Key, Read], can_wait: bool
    ) -> None:
        """Begin reads that compute waits for; ``can_wait`` says that it has something to do yet."""
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
        while self._announced:
            slot = self._idle_slot()
            if slot is None:
                return
            key = self._announced.popleft()
            self._unused.add(key)
            self.statistics.layers[key[0]].prefetch_issued += 1
            self._submit(key, slot, is_urgent=False)

    def _idle_slot(self) -> int | None:
        """Return a free slot, or that of the least recently used expert nobody expects."""
        if self._free:
            return self._free.popleft()
        for key in self._resident:
            if key not in self._expected:
                return self._put_out(key)
        return None

    def _slot_of_prefetch(self) -> int | None:
        """Return the slot of something expected later, which is read again as soon as may be.

        Compute cannot go on without it, and what is needed last goes first.
        """
        for read in reversed(self._loading.values()):
            if self._reads.cancel(read):
                del self._loading[read.key]
                self._waste(read.key)
                self._announced.appendleft(read.key)
                return read.slot
        for key in reversed(self._resident):
            slot = self._put_out(key)
            self._announced.appendleft(key)
            return slot
        return None

    def _put_out(self, key: Key) -> int:
        self.statistics.evictions += 1
        self._waste(key)
        return self._resident.pop(key)

    def _waste(self, key: Key) -> None:
        if key in self._unused:
            self._unused.discard(key)
            self.statistics.layers[key[0]].prefetch_wasted += 1

    def _submit(self, key: Key, slot: int, is_urgent: bool) -> Read:
        reads = self._folder.expert_reads(*key, self._slots.slot_views(slot))
        parts: deque[Callable[[], None]] = deque(partial(_read_patiently, read) for read in reads)
        read = Read(key, slot, is_urgent, parts, is_prefetch=not is_urgent)
        self._loading[key] = read
        self._reads.submit(read)
        return read

    def _next_ready(self, layer: int, reading: dict[Key, Read]) -> list[int]:
        """Wait for reads and return the experts that came; with none of ours under way, wait for a
        slot that somebody's prefetch holds."""
        started = time.perf_counter()
        finished = self._reads.wait_for_any(reading.values() or self._loading.values())
        self.statistics.layers[layer].stall_s += time.perf_counter() - started
        ready: list[Read] = []
        failed: list[Read] = []
        for read in finished:
            self._settle(read)
            if reading.pop(read.key, None) is not None:
                (ready if read.error is None else failed).append(read)
        if failed:
            # What else is under way is waited for in any case, so one error names all that failed.
            self._reads.wait_for_all(reading.values())
            failed += [read for read in reading.values() if read.error is not None]
            cause = failed[0].error
            raise ExpertReadError(
                f"an expert of layer {layer} could not be read ({cause}); try again later.",
                experts=(read.key[1] for read in failed),
            ) from cause
        return sorted(read.key[1] for read in ready)

    def _settle_finished(self, wanted: Container[Key]) -> None:
        """Book the reads that are done, but for those the caller waits for."""
        for read in [r for r in self._loading.values() if r.is_done and r.key not in wanted]:
            self._settle(read)

    def _settle(self, read: Read) -> None:
        """Book a read that is done: its expert is resident now, or its slot is free again."""
        del self._loading[read.key]
        if read.error is None:
            self._resident[read.key] = read.slot
            traffic = self.statistics.layers[read.key[0]]
            traffic.bytes_read += self.slot_bytes
            traffic.prefetch_bytes += self.slot_bytes * read.is_prefetch
        else:
            self._free.append(read.slot)
            self._waste(read.key)


def count_slots(folder: ModelFolder, dtype: torch.dtype, budget_bytes: int) -> int:
    """Return how many experts a budget holds; :class:`ConfigError` where it holds none."""
    config = folder.config
    if config.moe is None:
        raise ConfigError("expert-memory is set, but the model has no experts; leave it out.")
    slot_bytes = expert_bytes(config, dtype, folder.packed)
    if budget_bytes < slot_bytes:
        raise ConfigError(
            f"expert-memory is {budget_bytes} bytes, but one expert takes {slot_bytes}; "
            "give at least that."
        )
    return min(len(config.moe_layers) * config.moe.num_experts, budget_bytes // slot_bytes)


def _read_patiently(read: Callable[[], None]) -> None:
    """Try again when a disk or a network file system has a bad moment."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            read()
            return
        except OSError:
            if attempt == READ_ATTEMPTS:
                raise
            time.sleep(RETRY_PAUSE_S * attempt)
