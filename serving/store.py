"""The expert store: experts on disk, some of them in slots in memory.

S slots, E experts per layer, F expert width, D model width.

One pool of slots serves all layers, least recently used first out. Reads run in a bounded pool of
threads and go straight into slots that nothing else uses, while the caller computes with experts
that are ready.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError, ExpertReadError
from ..kernels.expert_weights import ExpertWeights, empty_slots
from ..moe.model_folder import ModelFolder
from ..moe.tensor_names import expert_tensor_name

READ_ATTEMPTS = 3
RETRY_PAUSE_S = 0.05

Key = tuple[int, int]
"""(layer, expert)."""


@dataclass(slots=True)
class LayerTraffic:
    """What one layer asked of the store so far."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    """Seconds the compute thread waited for reads."""


@dataclass(slots=True)
class StoreStatistics:
    """Counters since start."""

    layers: dict[int, LayerTraffic] = field(default_factory=dict)
    evictions: int = 0


class ExpertStore:
    """Experts of a model folder behind ``num_slots`` slots. Used by one compute thread."""

    def __init__(
        self,
        folder: ModelFolder,
        dtype: torch.dtype,
        budget_bytes: int,
        num_threads: int = 4,
    ) -> None:
        config, moe = folder.config, folder.config.moe
        if moe is None:
            raise ConfigError("expert-memory is set, but the model has no experts; leave it out.")
        self._folder = folder
        self._num_experts = moe.num_experts
        self._layers = [layer for layer in range(config.num_layers) if config.is_moe(layer)]
        self.slot_bytes = 3 * moe.d_expert * config.d_model * dtype.itemsize
        if budget_bytes < self.slot_bytes:
            raise ConfigError(
                f"expert-memory is {budget_bytes} bytes, but one expert takes {self.slot_bytes}; "
                "give at least that."
            )
        self.num_slots = min(len(self._layers) * moe.num_experts, budget_bytes // self.slot_bytes)
        self._fc1_SHD = empty_slots(self.num_slots, 2 * moe.d_expert, config.d_model, dtype)
        self._fc2_SDF = empty_slots(self.num_slots, config.d_model, moe.d_expert, dtype)
        self._free = deque(range(self.num_slots))
        self._resident: OrderedDict[Key, int] = OrderedDict()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="expert-read")
        self.statistics = StoreStatistics(layers={layer: LayerTraffic() for layer in self._layers})

    @property
    def num_resident(self) -> int:
        """Experts in memory now."""
        return len(self._resident)

    def close(self) -> None:
        """Stop the reading threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def stream(
        self, layer: int, experts: Sequence[int]
    ) -> Iterator[tuple[list[int], ExpertWeights]]:
        """Yield all of ``experts`` in waves, each with weights that stay valid until the next.

        Resident experts come first, while the others are being read. Raises
        :class:`ExpertReadError` when a read fails for good; slots then stay consistent.
        """
        traffic = self.statistics.layers[layer]
        ready = [expert for expert in experts if (layer, expert) in self._resident]
        waiting = deque(expert for expert in experts if (layer, expert) not in self._resident)
        traffic.hits += len(ready)
        traffic.misses += len(waiting)
        for expert in ready:
            self._resident.move_to_end((layer, expert))
        reading: dict[Future[None], tuple[int, int]] = {}
        try:
            while ready or waiting or reading:
                self._start_reads(layer, waiting, reading, pinned=ready)
                if ready:
                    yield ready, self._weights(layer)
                    ready = []
                else:
                    ready = self._finish_reads(layer, reading, traffic)
        finally:
            # Whatever ended the wave, no thread may write into a slot that is given away.
            wait(reading)
            for future, (expert, slot) in reading.items():
                self._settle(future, (layer, expert), slot)

    def _weights(self, layer: int) -> ExpertWeights:
        slots = tuple(self._resident.get((layer, e), -1) for e in range(self._num_experts))
        return ExpertWeights(self._fc1_SHD, self._fc2_SDF, slots)

    def _start_reads(
        self,
        layer: int,
        waiting: deque[int],
        reading: dict[Future[None], tuple[int, int]],
        pinned: list[int],
    ) -> None:
        keep = {(layer, expert) for expert in pinned}
        while waiting:
            slot = self._take_slot(keep)
            if slot is None:
                return
            expert = waiting.popleft()
            reading[self._pool.submit(self._read, layer, expert, slot)] = (expert, slot)

    def _take_slot(self, keep: set[Key]) -> int | None:
        if self._free:
            return self._free.popleft()
        for key in self._resident:
            if key not in keep:
                self.statistics.evictions += 1
                return self._resident.pop(key)
        return None

    def _finish_reads(
        self, layer: int, reading: dict[Future[None], tuple[int, int]], traffic: LayerTraffic
    ) -> list[int]:
        started = time.perf_counter()
        finished, _ = wait(reading, return_when=FIRST_COMPLETED)
        traffic.stall_s += time.perf_counter() - started
        ready, failure = [], None
        for future in finished:
            expert, slot = reading.pop(future)
            error = self._settle(future, (layer, expert), slot)
            if error is None:
                ready.append(expert)
                traffic.bytes_read += self.slot_bytes
            else:
                failure = error
        if failure is not None:
            raise ExpertReadError(
                f"an expert of layer {layer} could not be read ({failure}); try again later."
            ) from failure
        return sorted(ready)

    def _settle(self, future: Future[None], key: Key, slot: int) -> BaseException | None:
        error = future.exception()
        if error is None:
            self._resident[key] = slot
        else:
            self._free.append(slot)
        return error

    def _read(self, layer: int, expert: int, slot: int) -> None:
        views = ExpertWeights(self._fc1_SHD, self._fc2_SDF).slot_views(slot)
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                for part, view in views.items():
                    name = expert_tensor_name(layer, expert, part)
                    self._folder.locate(name).read_into(name, view)
                return
            except OSError:
                if attempt == READ_ATTEMPTS:
                    raise
                time.sleep(RETRY_PAUSE_S * attempt)
