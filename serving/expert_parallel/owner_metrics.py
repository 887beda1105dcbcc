"""Prometheus metrics of the owners, as the leader sees them."""

from collections.abc import Iterable, Iterator

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .frames import Head

BUCKETS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10)
COUNTERS = {
    "rows": "Routed rows that an owner computed; owner 0 is the leader itself",
    "sent_bytes": "Bytes of rows and their experts sent to an owner",
    "received_bytes": "Bytes of lines received from an owner",
    "compute_seconds": "Seconds an owner took for its answers, its reads included",
    "losses": "Times that an owner was lost",
}
STORE = {
    "cache_hits": ("hits", "Experts in an owner's memory when they were needed"),
    "cache_misses": ("misses", "Experts that an owner had to wait for"),
    "read_bytes": ("bytes_read", "Bytes of experts that an owner read"),
    "stall_seconds": ("stall_s", "Seconds an owner waited for reads"),
}
"""End of the metric's name: field of :class:`.Head`, and help."""
PREFIX = "moeyard_expert_owner"


class OwnerMetrics(Collector):
    """Counts by owner."""

    def __init__(self, num_owners: int) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, ["owner"], registry=None)

        self._counters = {name: counter(name, text) for name, text in COUNTERS.items()}
        self._store = {name: counter(name, text) for name, (_, text) in STORE.items()}
        self._round_trips = Histogram(
            f"{PREFIX}_round_trip_seconds",
            "From sending rows to an owner to its lines, its compute included",
            ["owner"],
            buckets=BUCKETS,
            registry=None,
        )
        self._up = Gauge(f"{PREFIX}_up", "1 while an owner is connected", ["owner"], registry=None)
        self._experts = Gauge(
            f"{PREFIX}_experts", "Experts that belong to an owner", ["owner"], registry=None
        )
        self.owners = [OneOwner(self, str(owner)) for owner in range(num_owners)]

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        metrics = (self._round_trips, self._up, self._experts)
        for metric in (*self._counters.values(), *self._store.values(), *metrics):
            yield from metric.collect()

    def set_experts(self, counts: Iterable[int]) -> None:
        """Say how many experts each owner has."""
        for owner, count in enumerate(counts):
            self._experts.labels(str(owner)).set(count)


class OneOwner:
    """The series of one owner."""

    def __init__(self, metrics: OwnerMetrics, owner: str) -> None:
        children = {name: found.labels(owner) for name, found in metrics._counters.items()}
        self.rows, self.losses = children["rows"], children["losses"]
        self.sent, self.received = children["sent_bytes"], children["received_bytes"]
        self._compute = children["compute_seconds"]
        self._store = {STORE[name][0]: c.labels(owner) for name, c in metrics._store.items()}
        self._round_trip = metrics._round_trips.labels(owner)
        self.up = metrics._up.labels(owner)
        self._known: dict[int, Head] = {}
        """The last answer for each layer: stores count from their start."""

    def answer(self, head: Head, payload: int, seconds: float) -> None:
        """Count an answer that came after ``seconds``."""
        self.received.inc(payload)
        self._round_trip.observe(seconds)
        self._compute.inc(head.seconds)
        before = self._known.get(head.layer)
        for field, series in self._store.items():
            change = getattr(head, field) - (0 if before is None else getattr(before, field))
            if change > 0:
                series.inc(change)
        self._known[head.layer] = head

    def start_again(self) -> None:
        """Another process has taken the owner's place; its store counts from 0."""
        self._known.clear()
