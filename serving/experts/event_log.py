"""What happens in a store, event by event, in a file that a replay follows (docs/offloading.md)."""

import json
import logging
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .policies.policy import CacheFacts
from .pools import Pools

log = logging.getLogger(__name__)

FORMAT, VERSION = "moeyard-expert-log", 1
SUFFIX = ".events"
FLUSH_EVERY_S = 2.0

FORWARD, NEED, ADMIT, ARRIVE, EVICT, DROP, FAILED, END = (
    *("forward", "need", "admit", "arrive", "evict", "drop", "failed", "end"),
)
"""Kinds of events. ``admit`` is a read that begins ahead of need, ``drop`` one that brought
nothing; reads on demand begin with the need."""


class EventLog:
    """Writes events as lines of JSON, a few seconds late at most.

    The compute thread notes events, and another thread writes them. A file that cannot be written
    any more, as on a full disk, ends the log and not the run.
    """

    def __init__(self, path: Path, facts: CacheFacts, pools: Pools, policy: str) -> None:
        self._path = path
        self._events: deque[tuple[Any, ...]] = deque()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        """Two threads may write."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": facts.architecture,
            "moe_layers": facts.moe_layers,
            "num_experts": facts.num_experts,
            "num_slots": facts.num_slots,
            "slot_bytes": max(pools.slot_bytes),
            "policy": policy,
        }
        if len(pools) > 1:
            header["pools"] = {
                "num_slots": pools.num_slots,
                "slot_bytes": pools.slot_bytes,
                "pool_of": [[*key, pool] for key, pool in pools.pool_of.items()],
            }
        try:
            self._file = path.open("wb", buffering=0)
            self._file.write(json.dumps(header).encode() + b"\n")
        except OSError as error:
            raise ConfigError(
                f"expert-log {path} cannot be written ({error.strerror}); give another file."
            ) from None
        self._thread = threading.Thread(target=self._run, name="expert-log", daemon=True)
        self._thread.start()

    def add(self, kind: str, *values: int) -> None:
        """Note an event."""
        if not self._ended.is_set():
            self._events.append((kind, *values))

    def close(self, counters: Mapping[str, int]) -> None:
        """Write the end, with what the store has counted."""
        if self._ended.is_set():
            return
        self._events.append((END, counters))
        self._flush()
        self._ended.set()
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        while not self._ended.wait(FLUSH_EVERY_S):
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            events = [self._events.popleft() for _ in range(len(self._events))]
            data = memoryview("".join(map(_line, events)).encode())
            try:
                while data and not self._ended.is_set():
                    data = data[self._file.write(data) :]
            except OSError as error:
                self._ended.set()
                log.warning(
                    "expert-log %s cannot be written any more (%s); later events are left out.",
                    self._path,
                    error.strerror,
                )


def _line(event: tuple[Any, ...]) -> str:
    """Return an event as JSON; plain formatting takes half of json's time."""
    kind, *values = event
    if kind == END:
        return f"{json.dumps(event)}\n"
    return f'["{kind}"{"".join(f", {value}" for value in values)}]\n'
