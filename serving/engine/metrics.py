"""Prometheus metrics of one engine; expert_metrics.py has those of its experts."""

from collections.abc import Iterable
from time import perf_counter
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

from ...moe.config.model import ModelConfig
from ...moe.routers.routing import Routing
from ..experts.store import ExpertStore
from .admission import Rejection
from .expert_metrics import ExpertCollector
from .kv_metrics import KVMetrics
from .sequence import FinishReason, GenerationEvent, Sequence

disable_created_metrics()  # a second series per counter that nothing here reads

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
TOKEN_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    2.5,
    5,
)
REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class EngineMetrics:
    """What an engine counts; ``render`` gives the exposition text."""

    def __init__(self, config: ModelConfig, store: ExpertStore | None) -> None:
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
        self.prompt_tokens = Counter("moeyard_prompt_tokens", "Prompt tokens read", registry=r)
        self.generated = Counter("moeyard_generation_tokens", "Tokens generated", registry=r)
        self.time_to_first = Histogram(
            "moeyard_time_to_first_token_seconds",
            "Arrival to first token",
            buckets=TTFT_BUCKETS,
            registry=r,
        )
        self.inter_token = Histogram(
            "moeyard_inter_token_latency_seconds",
            "Between tokens of a request",
            buckets=TOKEN_BUCKETS,
            registry=r,
        )
        self.request_time = Histogram(
            "moeyard_e2e_request_latency_seconds",
            "Arrival to last token",
            buckets=REQUEST_BUCKETS,
            registry=r,
        )
        self.kv = KVMetrics(r)
        self.experts = ExpertCollector(config, store)
        r.register(self.experts)

    def count_routing(self, routings: Iterable[Routing]) -> None:
        """Add one forward's routed rows."""
        self.experts.add(list(routings))

    def count_tokens(self, sequence: Sequence, events: list[GenerationEvent], now: float) -> None:
        """Count the tokens that a step brought, an event each, and with the last one the request.

        Tokens of one step share the time since the one before.
        """
        times = sequence.times
        self.generated.inc(len(events))
        if times.last_token is None:
            self.prompt_tokens.inc(len(sequence.request.prompt_ids))
            self.time_to_first.observe(now - times.arrived)
        else:
            for _ in events:
                self.inter_token.observe((now - times.last_token) / len(events))
        times.last_token = now
        finish_reason = events[-1].finish_reason
        if finish_reason is not None:
            self.finished.labels(finish_reason).inc()
            self.request_time.observe(now - times.arrived)

    def count_prompt(self, sequence: Sequence) -> None:
        """Count a request that asked for no tokens and has read its prompt."""
        self.prompt_tokens.inc(len(sequence.request.prompt_ids))
        self.finished.labels("length").inc()
        self.request_time.observe(perf_counter() - sequence.times.arrived)

    def count_failure(self) -> None:
        """Count a request that ended with an error."""
        self.finished.labels("error").inc()

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
