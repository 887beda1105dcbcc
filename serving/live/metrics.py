"""Prometheus metrics of a server that follows a run."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ...moe.updates.manifest import Manifest

RESULTS = ("applied", "refused")


class LiveMetrics(Collector):
    """Which version a server has, how old it is, and what became of the others."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.current: Manifest | None = None
        """None before the first version; the weights are then those of the model folder."""
        self.newest = 0
        """The newest version in the folder."""
        self._updates = Counter(
            "moeyard_live_updates", "Versions by what became of them", ["result"], registry=registry
        )
        for result in RESULTS:
            self._updates.labels(result)
        self._bytes = Counter(
            "moeyard_live_update_bytes", "Bytes of units that were applied", registry=registry
        )
        self._read_s = Counter(
            "moeyard_live_read_seconds", "Time to read and check updates", registry=registry
        )
        self._stall_s = Counter(
            "moeyard_live_stall_seconds",
            "Time that the engine stood still while weights changed",
            registry=registry,
        )
        registry.register(self)

    def refuse(self) -> None:
        """Count a version that cannot be used."""
        self._updates.labels("refused").inc()

    def apply(self, versions: list[Manifest], read_s: float, stall_s: float) -> None:
        """Count versions that were applied together."""
        self.current = versions[-1]
        self._updates.labels("applied").inc(len(versions))
        self._bytes.inc(sum(manifest.num_bytes for manifest in versions))
        self._read_s.inc(read_s)
        self._stall_s.inc(stall_s)

    def facts(self) -> dict[str, int] | None:
        """Return version and step of the weights; None before the first version."""
        current = self.current
        return None if current is None else {"version": current.version, "step": current.step}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges, as they are now."""
        current = self.current
        version = 0 if current is None else current.version
        values: dict[str, tuple[str, float]] = {
            "version": ("Version of the weights; 0 = those of the model folder", version),
            "versions_behind": ("Newer versions in the folder", max(0, self.newest - version)),
        }
        if current is not None:
            age_s = self._clock() - current.published
            values["step"] = ("Step of the run after which the weights were these", current.step)
            values["staleness_seconds"] = ("Seconds since that step", age_s)
        for name, (help_text, value) in values.items():
            yield GaugeMetricFamily(f"moeyard_live_{name}", help_text, value=value)
