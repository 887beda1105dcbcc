"""Host memory in front of the disk: one copy of an expert for all replicas of a node."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from ....moe.folders.expert_layouts import ExpertViews
from ..policies.policy import Key
from ..pools import Pools
from .rates import Rates, Source
from .stored_form import CHECKSUM_BYTES, copy_in, copy_out, num_bytes_of
from .tier import Tier

log = logging.getLogger(__name__)

NUM_BUFFERS = 2
"""Experts that wait to be copied into host memory; while they do, further ones are not copied."""


class Copies(Protocol):
    """Where copies are: :class:`~.node_link.NodeLink`."""

    @property
    def has_other_nodes(self) -> bool:
        """Say whether other nodes hold copies of the model."""
        ...

    def find(self, key: Key) -> np.ndarray | None:
        """Return this node's copy of an expert's bytes."""
        ...

    def find_elsewhere(self, key: Key) -> np.ndarray | None:
        """Return another node's copy."""
        ...

    def drop(self, key: Key) -> None:
        """Let this node forget a copy, which is damaged."""
        ...

    def bring(self, key: Key, stored: np.ndarray) -> bool:
        """Give this node a copy."""
        ...

    def close(self) -> None:
        """Say that no more is asked for."""
        ...


class HostTier:
    """A :class:`Tier` that takes an expert from memory where that is faster than the disk."""

    def __init__(self, disk: Tier, copies: Copies, rates: Rates, pools: Pools) -> None:
        self._disk = disk
        self._copies = copies
        self._rates = rates
        self._pools = pools
        self._bringer = _Bringer(copies, max(pools.slot_bytes))

    def straight(self, key: Key, views: ExpertViews) -> None:
        """Return None: who has the expert is known only when its read begins."""

    def reads(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return a call that looks into memory, then those of the disk, which may have no work."""
        num_bytes = self._pools.bytes_of(key)
        fill = _Fill(key, views, num_bytes, self._copies, self._rates, self._bringer)
        calls = self._disk.reads(key, views)
        return [fill.from_memory, *(partial(fill.from_disk, call) for call in calls), fill.finish]

    def close(self) -> None:
        """Stop the copying thread and leave the copies to others."""
        self._bringer.close()
        self._copies.close()


class _Fill:
    """One expert on its way into a slot. Its calls run one after the other."""

    def __init__(
        self,
        key: Key,
        views: ExpertViews,
        num_bytes: int,
        copies: Copies,
        rates: Rates,
        bringer: "_Bringer",
    ) -> None:
        self._key = key
        self._num_bytes = num_bytes
        self._views = views
        self._copies = copies
        self._rates = rates
        self._bringer = bringer
        self._source: Source = "disk"
        self._seconds = 0.0

    def from_memory(self) -> None:
        """Fill the slot from this node's memory or another's, if that has the expert."""
        if self._rates.is_worth_asking("host"):
            self._take("host", self._copies.find)
        if (
            self._source == "disk"
            and self._copies.has_other_nodes
            and self._rates.is_worth_asking("other_node")
        ):
            self._take("other_node", self._copies.find_elsewhere)

    def from_disk(self, read: Callable[[], None]) -> None:
        """Fill a part of the slot, unless the slot is full."""
        if self._source == "disk":
            started = time.perf_counter()
            read()
            self._seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Offer the expert to the node, if it had none."""
        self._rates.observe(self._source, self._seconds, self._num_bytes)
        if self._source != "host":
            self._bringer.offer(self._key, self._views)

    def _take(self, source: Source, find: Callable[[Key], np.ndarray | None]) -> None:
        started = time.perf_counter()
        stored = find(self._key)
        if stored is None:
            return
        if not copy_in(self._views, stored):
            log.warning("a copy of %s in memory is damaged; it is dropped.", self._key)
            self._copies.drop(self._key)
            return
        self._source, self._seconds = source, time.perf_counter() - started


class _Bringer:
    """A thread that brings experts into the node's memory, behind compute's back.

    A slot's bytes are copied first: the slot may get another expert at any time.
    """

    def __init__(self, copies: Copies, most_bytes: int) -> None:
        self._copies = copies
        num_bytes = most_bytes + CHECKSUM_BYTES
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(np.empty(num_bytes, np.uint8))
        self._full: queue.SimpleQueue[tuple[Key, np.ndarray, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="bring-experts", daemon=True)
        self._thread.start()

    def offer(self, key: Key, views: ExpertViews) -> None:
        """Bring an expert, unless all buffers are in use; does not wait."""
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            return
        copy_out(views, buffer[: num_bytes_of(views)])
        self._full.put((key, buffer, num_bytes_of(views)))

    def close(self) -> None:
        """Bring what is waiting, and stop."""
        self._full.put(None)
        self._thread.join(timeout=30.0)

    def _run(self) -> None:
        while (task := self._full.get()) is not None:
            key, buffer, num_bytes = task
            self._copies.bring(key, buffer[:num_bytes])
            self._free.put(buffer)
