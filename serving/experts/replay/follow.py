"""Follow a store's log together with the routes of the same run, and count again."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import DataError
from ..event_log import (
    ADMIT,
    ARRIVE,
    DROP,
    END,
    EVICT,
    FAILED,
    FORMAT,
    FORWARD,
    NEED,
    VERSION,
)
from ..policies.policy import Key
from ..pools import Pools
from ..recorded import RecordedForward
from ..traffic import StoreStatistics
from .run import Counters, counters_of


@dataclass(frozen=True, slots=True)
class LogHeader:
    """The first line of a log."""

    architecture: str
    moe_layers: tuple[int, ...]
    num_experts: int
    num_slots: int
    slot_bytes: int
    policy: str
    pools: Pools
    """One of ``num_slots``, unless the experts have several widths."""


class LogFile:
    """A log. Opening reads its first line; raises :class:`DataError` if it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                values = json.loads(file.readline(1 << 20))
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError
            values["moe_layers"] = tuple(values["moe_layers"])
            values["pools"] = _pools(values)
            self.header = LogHeader(**values)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); give a log.") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(
                f"{path} is no log of this version; give a file that --expert-log wrote."
            ) from None
        self.damage: str | None = None
        """After :meth:`events`: one sentence if the file was cut short, else None."""

    def events(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield the number of each line and its event; the end is the last one."""
        self.damage = f"{self.path} was cut short, or is still being written."
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 or not line.endswith(b"\n"):
                    continue
                try:
                    event = json.loads(line)
                    kind = event[0]
                except (ValueError, TypeError, IndexError):
                    raise DataError(f"{self.path} is damaged in line {number}.") from None
                if kind == END:
                    self.damage = None
                yield number, event


def _pools(values: dict[str, Any]) -> Pools:
    several = values.pop("pools", None)
    if several is None:
        return Pools((values["num_slots"],), (values["slot_bytes"],))
    pool_of = {(layer, expert): pool for layer, expert, pool in several["pool_of"]}
    return Pools(tuple(several["num_slots"]), tuple(several["slot_bytes"]), pool_of)


def follow(
    file: LogFile, forwards: Sequence[RecordedForward], routes_are_whole: bool = True
) -> Counters:
    """Return what the store counted, from the events and what the routes needed.

    Raises :class:`DataError` for a log that contradicts itself or the routes. Forwards that failed
    are in the log only. If the log or the routes were cut short, the longer one's rest is ignored.
    """
    state = _State(file)
    needs = _Needs(file, forwards, routes_are_whole)
    for number, event in file.events():
        kind, values = event[0], event[1:]
        if kind == FORWARD:
            needs.begin(number)
        elif kind == NEED:
            needs.add(number, values[0], values[1:])
            state.need(values[0], values[1:])
        elif kind == FAILED:
            needs.fail()
        elif kind == END:
            needs.end(number)
            state.check_end(number, values[0])
        else:
            state.move(number, kind, (values[0], values[1]))
    return counters_of(state.statistics)


class _State:
    """Where the experts are, by the log."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._here: set[Key] = set()
        self._coming: set[Key] = set()
        self.statistics = StoreStatistics(file.header.moe_layers, file.header.pools.bytes_of)
        self._admitted: set[Key] = set()
        """Those of ``coming`` whose read began ahead of need."""

    def need(self, layer: int, experts: Sequence[int]) -> None:
        # Reads on demand end with their layer; a layer that failed did not begin all of them.
        self._coming &= self._admitted
        for expert in experts:
            key = (layer, expert)
            if key in self._here:
                self.statistics.hit(key)
            elif key in self._coming:
                self.statistics.late(key)
            else:
                self.statistics.miss(key)
                self._coming.add(key)

    def move(self, number: int, kind: str, key: Key) -> None:
        """Follow one expert; every event must be possible where the expert is."""
        is_here, is_coming = key in self._here, key in self._coming
        pools = self._file.header.pools
        pool = pools.of(key)
        num_here = (
            sum(pools.of(other) == pool for other in self._here)
            if len(pools) > 1
            else (len(self._here))
        )
        possible = {
            ADMIT: not (is_here or is_coming),
            ARRIVE: is_coming and num_here < pools.num_slots[pool],
            EVICT: is_here,
            DROP: is_coming,
        }
        if not possible.get(kind, False) or key[0] not in self.statistics.layers:
            where = "in memory" if is_here else "on its way" if is_coming else "on disk"
            raise DataError(
                f"{self._file.path} contradicts itself in line {number}: {kind} of expert {key[1]} "
                f"in layer {key[0]}, which is {where}, with {num_here} of "
                f"{pools.num_slots[pool]} slots taken; log the run again."
            )
        if kind == ADMIT:
            self._coming.add(key)
            self._admitted.add(key)
            self.statistics.prefetch(key)
            return
        (self._here if kind == EVICT else self._coming).discard(key)
        if kind == ARRIVE:
            self._here.add(key)
            self.statistics.read(key, key in self._admitted)
        elif kind == EVICT:
            self.statistics.put_out(key)
        else:
            self.statistics.lose(key)
        self._admitted.discard(key)

    def check_end(self, number: int, counted: dict[str, int]) -> None:
        found = self.statistics.totals()
        for name, value in found.items():
            if counted.get(name) != value:
                raise DataError(
                    f"{self._file.path} contradicts itself in line {number}: the store counted "
                    f"{name}={counted.get(name)}, and the events say {value}; log the run again."
                )


class _Needs:
    """Compares what the log says was needed with the routes, forward by forward."""

    def __init__(
        self, file: LogFile, forwards: Sequence[RecordedForward], routes_are_whole: bool
    ) -> None:
        self._file = file
        self._layers = file.header.moe_layers
        self._forwards = forwards
        self._routes_are_whole = routes_are_whole
        self._next = 0
        self._seen: list[tuple[int, ...]] = []
        self._has_failed = False

    def begin(self, number: int) -> None:
        """Close the forward before this one."""
        self._close(number)
        self._seen, self._has_failed = [], False

    def add(self, number: int, layer: int, experts: Sequence[int]) -> None:
        self._seen.append((layer, *experts))

    def fail(self) -> None:
        self._has_failed = True

    def end(self, number: int) -> None:
        self._close(number)
        if self._next < len(self._forwards):
            raise DataError(
                f"{self._file.path} ends after {self._next} forwards, but the routes have "
                f"{len(self._forwards)}; give the log and the routes of one run."
            )

    def _close(self, number: int) -> None:
        if self._has_failed or len(self._seen) < len(self._layers):
            return  # a forward that failed: no routes of it were recorded
        if self._next == len(self._forwards):
            if self._routes_are_whole:
                raise DataError(
                    f"{self._file.path} goes on in line {number} after the {self._next} forwards "
                    "of the routes; give the log and the routes of one run."
                )
            return
        wanted = zip(self._layers, self._forwards[self._next].rows_of_L, strict=True)
        if self._seen != [(layer, *rows_of) for layer, rows_of in wanted]:
            raise DataError(
                f"{self._file.path} contradicts the routes before line {number}: forward "
                f"{self._next} of the routes needed other experts; give the log and the routes of "
                "one run."
            )
        self._next += 1
