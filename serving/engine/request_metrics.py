"""Prometheus metrics of requests, whatever they ask for, and of the experts that answer them."""

from collections.abc import Iterable
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from ...moe.config.model import LayersConfig
from ...moe.routers.routing import Routing
from ..experts.store import ExpertStore
from .admission import Rejection
from .expert_metrics import ExpertCollector
from .sequence import FinishReason

disable_created_metrics()  # a second series per counter that nothing here reads

REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class RequestMetrics:
    """What every server counts; ``render`` gives the exposition text."""

    def __init__(self, config: LayersConfig, store: ExpertStore | None) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        ProcessCollector(registry=r)
        self.running = Gauge("moeyard_requests_running", "Requests in the batch", registry=r)
        self.waiting = Gauge("moeyard_requests_waiting", "Requests queued", registry=r)
        self.finished = Counter(
            "moeyard_requests_finished", "Requests ended", ["finish_reason"], registry=r
        )
        self.cancelled = Counter(
            "moeyard_requests_cancelled", "Requests cancelled by the client", registry=r
        )
        self.rejected = Counter(
            "moeyard_requests_rejected", "Requests not let in", ["reason"], registry=r
        )
        # Series that are there from the start, at 0: a rate misses the rise of a new one.
        for finish_reason in get_args(FinishReason):
            self.finished.labels(finish_reason)
        for reason in get_args(Rejection):
            self.rejected.labels(reason)
        self.request_time = Histogram(
            "moeyard_e2e_request_latency_seconds",
            "Arrival to last token",
            buckets=REQUEST_BUCKETS,
            registry=r,
        )
        self.experts = ExpertCollector(config, store)
        r.register(self.experts)

    def count_routing(self, routings: Iterable[Routing]) -> None:
        """Add one forward's routed rows."""
        self.experts.add(list(routings))

    def count_failure(self) -> None:
        """Count a request that ended with an error."""
        self.finished.labels("error").inc()

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
