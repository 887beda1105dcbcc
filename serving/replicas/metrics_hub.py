"""The metrics of several replicas as one: sums that never go back when a replica ends.

An incarnation is one life of one replica. A snapshot is what its registry collected, as plain
tuples. Counters and histograms are added over all incarnations there ever were, gauges over those
that live.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Labels = tuple[tuple[str, str], ...]
Series = tuple[str, Labels]
Family = tuple[str, str, str, tuple[tuple[str, Labels, float], ...]]
"""Name, documentation, type, and samples: name, labels, value."""
Snapshot = tuple[Family, ...]

LIVES_FOR_S = 10.0
"""Gauges omit an incarnation that has been silent for this long."""
FOLDED_AFTER_S = 900.0
"""Silence after which an incarnation counts as ended: Ray has replaced it long before."""

COUNTING = frozenset({"counter", "histogram", "summary"})
AGREED: dict[str, Callable[[Iterable[float]], float]] = {
    "moeyard_moe_top_k": max,
    "moeyard_expert_slot_bytes": max,
    "moeyard_live_version": min,
    "moeyard_live_step": min,
    "moeyard_live_versions_behind": max,
    "moeyard_live_staleness_seconds": max,
    "process_start_time_seconds": min,
    "process_max_fds": min,
}
"""Gauges that all replicas share, or of which one stands for all."""
RATIOS = ("_ratio", "_over_mean")
"""Gauges with these endings cannot be added: each replica keeps its own, with a label."""
PER_EXPERT = "moeyard_expert_tokens"
LOAD: dict[str, Callable[[list[float]], float]] = {
    "moeyard_expert_load_max_over_mean": lambda counts: (
        max(counts) * len(counts) / sum(counts) if sum(counts) else 0.0
    ),
    "moeyard_experts_idle": lambda counts: float(counts.count(0)),
}
"""Gauges of a layer that follow from the rows of its experts, and so from the summed rows."""


@dataclass(slots=True)
class Incarnation:
    """What is known of one life of a replica."""

    replica: str
    snapshot: Snapshot
    heard_at: float
    num_open: int
    """HTTP requests whose responses have not ended."""
    is_draining: bool


class MetricsHub:
    """The latest snapshot of every incarnation, and the sum of those that ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, Incarnation] = {}
        self._base: Snapshot = ()
        self._ended: set[str] = set()

    def push(
        self,
        incarnation: str,
        replica: str,
        snapshot: Snapshot,
        num_open: int = 0,
        is_draining: bool = False,
    ) -> None:
        """Take a snapshot in; what comes from an incarnation that has ended is dropped."""
        if incarnation not in self._ended:
            self._known[incarnation] = Incarnation(
                replica, snapshot, self._clock(), num_open, is_draining
            )
        for name, known in list(self._known.items()):
            if self._clock() - known.heard_at > FOLDED_AFTER_S:
                self.end(name)

    def end(self, incarnation: str) -> None:
        """Fold an incarnation's counts into the base; it will not be heard of again."""
        known = self._known.pop(incarnation, None)
        self._ended.add(incarnation)
        if known is not None:
            counted = (family for family in known.snapshot if family[2] in COUNTING)
            self._base = tuple(_add([self._base, counted]))

    def living(self) -> list[Incarnation]:
        """Return the incarnations heard of lately."""
        oldest = self._clock() - LIVES_FOR_S
        return [known for known in self._known.values() if known.heard_at >= oldest]

    def is_drained(self) -> bool:
        """True when every living replica has closed its doors and answered what it had."""
        return all(known.is_draining and known.num_open == 0 for known in self.living())

    def collect(self) -> Snapshot:
        """Return the families of all replicas together."""
        counts = [[f for f in known.snapshot if f[2] in COUNTING] for known in self._known.values()]
        counted = list(_add([self._base, *counts]))
        rows = next((samples for name, _, _, samples in counted if name == PER_EXPERT), ())
        gauges = [
            (known.replica, [f for f in known.snapshot if f[2] not in COUNTING])
            for known in self.living()
        ]
        return (*counted, *_combine(gauges, rows))

    def render(self) -> bytes:
        """Return the sums in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Families(self.collect()))
        return generate_latest(registry)


def snapshot_of(registry: CollectorRegistry) -> Snapshot:
    """Return what a registry collects now."""
    return tuple(
        (
            family.name,
            family.documentation,
            family.type,
            tuple((s.name, tuple(s.labels.items()), s.value) for s in family.samples),
        )
        for family in registry.collect()
    )


class _Families(Collector):
    """Families made elsewhere, for prometheus_client to write down."""

    def __init__(self, families: Snapshot) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield them as prometheus_client's own."""
        for name, documentation, kind, samples in self._families:
            metric = Metric(name, documentation, kind)
            for sample, labels, value in samples:
                metric.add_sample(sample, dict(labels), value)
            yield metric


def _add(parts: Iterable[Iterable[Family]]) -> Iterator[Family]:
    """Add families of the same name, series by series."""
    heads: dict[str, tuple[str, str]] = {}
    sums: dict[str, dict[Series, float]] = {}
    for part in parts:
        for name, documentation, kind, samples in part:
            heads.setdefault(name, (documentation, kind))
            total = sums.setdefault(name, {})
            for sample, labels, value in samples:
                total[sample, labels] = total.get((sample, labels), 0.0) + value
    for name, (documentation, kind) in heads.items():
        samples = tuple((*series, value) for series, value in sums[name].items())
        yield name, documentation, kind, samples


def _combine(
    parts: list[tuple[str, list[Family]]], rows: Iterable[tuple[str, Labels, float]]
) -> Iterator[Family]:
    """Combine the gauges of living replicas, each by what it means."""
    found: dict[str, list[tuple[str, Family]]] = {}
    for replica, families in parts:
        for family in families:
            found.setdefault(family[0], []).append((replica, family))
    loads = _rows_by_layer(rows)
    for name, members in found.items():
        _, documentation, kind, _ = members[0][1]
        if name in LOAD and loads:
            samples = tuple(
                (name, (("layer", layer),), LOAD[name](counts)) for layer, counts in loads.items()
            )
            yield name, documentation, kind, samples
        elif name in LOAD or name.endswith(RATIOS):
            yield name, documentation, kind, tuple(_labelled(members))
        else:
            yield name, documentation, kind, tuple(_together(members, AGREED.get(name, sum)))


def _rows_by_layer(rows: Iterable[tuple[str, Labels, float]]) -> dict[str, list[float]]:
    layers: dict[str, list[float]] = {}
    for _, labels, value in rows:
        layers.setdefault(dict(labels)["layer"], []).append(value)
    return layers


def _labelled(members: list[tuple[str, Family]]) -> Iterator[tuple[str, Labels, float]]:
    for replica, (_, _, _, samples) in members:
        for sample, labels, value in samples:
            yield sample, (*labels, ("replica", replica)), value


def _together(
    members: list[tuple[str, Family]], combine: Callable[[Iterable[float]], float]
) -> Iterator[tuple[str, Labels, float]]:
    values: dict[Series, list[float]] = {}
    for _, (_, _, _, samples) in members:
        for sample, labels, value in samples:
            values.setdefault((sample, labels), []).append(value)
    for (sample, labels), found in values.items():
        yield sample, labels, combine(found)
