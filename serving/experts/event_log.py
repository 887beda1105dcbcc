"""What happens in a store, event by event, in a file that a replay follows (docs/offloading.md)."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .policies.policy import CacheFacts

log = logging.getLogger(__name__)

FORMAT, VERSION = "moeyard-expert-log", 1
SUFFIX = ".events"
FLUSH_EVERY_S = 2.0
FLUSH_EVENTS = 8192

FORWARD, NEED, ADMIT, ARRIVE, EVICT, DROP, FAILED, END = (
    *("forward", "need", "admit", "arrive", "evict", "drop", "failed", "end"),
)
"""Kinds of events. ``admit`` is a read that begins ahead of need, ``drop`` one that brought
nothing; reads on demand begin with the need."""


class EventLog:
    """Writes events as lines of JSON, a few seconds late at most. Used by the compute thread.

    A file that cannot be written any more, as on a full disk, ends the log and not the run.
    """

    def __init__(self, path: Path, facts: CacheFacts, slot_bytes: int, policy: str) -> None:
        self._path = path
        self._events: list[tuple[Any, ...]] = []
        self._flushed = time.monotonic()
        header = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": facts.architecture,
            "moe_layers": facts.moe_layers,
            "num_experts": facts.num_experts,
            "num_slots": facts.num_slots,
            "slot_bytes": slot_bytes,
            "policy": policy,
        }
        try:
            self._file = path.open("wb", buffering=0)
            self._file.write(json.dumps(header).encode() + b"\n")
        except OSError as error:
            raise ConfigError(
                f"expert-log {path} cannot be written ({error.strerror}); give another file."
            ) from None

    def add(self, kind: str, *values: Any) -> None:
        """Note an event."""
        self._events.append((kind, *values))

    def begin(self) -> None:
        """Note a forward, and write what has gathered."""
        self._events.append((FORWARD,))
        now = time.monotonic()
        if len(self._events) >= FLUSH_EVENTS or now - self._flushed >= FLUSH_EVERY_S:
            self._flushed = now
            self._flush()

    def need(self, layer: int, experts: Iterable[int]) -> None:
        """Note what a layer needs, after what became of reads before that."""
        self._events.append((NEED, layer, *experts))

    def close(self, counters: Mapping[str, int]) -> None:
        """Write the end, with what the store has counted."""
        if not self._file.closed:
            self._events.append((END, counters))
            self._flush()
            self._file.close()

    def _flush(self) -> None:
        events, self._events = self._events, []
        if self._file.closed:
            return
        data = memoryview("".join(map(_line, events)).encode())
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.close()
            log.warning(
                "expert-log %s cannot be written any more (%s); later events are left out.",
                self._path,
                error.strerror,
            )


def _line(event: tuple[Any, ...]) -> str:
    """Return an event as JSON; plain formatting of the numbers takes a third of json's time."""
    kind, *values = event
    if kind == END:
        return f"{json.dumps(event)}\n"
    return f'["{kind}"{"".join(f", {value}" for value in values)}]\n'
