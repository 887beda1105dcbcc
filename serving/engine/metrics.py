"""Prometheus metrics of one engine; request_metrics.py has those that all servers have."""

from time import perf_counter

from prometheus_client import Counter, Histogram

from ...moe.config.model import ModelConfig
from ..experts.store import ExpertStore
from .kv_metrics import KVMetrics
from .request_metrics import RequestMetrics
from .sequence import GenerationEvent, Sequence

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


class EngineMetrics(RequestMetrics):
    """What an engine counts; ``render`` gives the exposition text."""

    def __init__(self, config: ModelConfig, store: ExpertStore | None) -> None:
        super().__init__(config, store)
        r = self.registry
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
        self.kv = KVMetrics(r)

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
