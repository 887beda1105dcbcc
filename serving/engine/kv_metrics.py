"""What an engine counts about keys and values."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from .blocks import BlockPool
from .jobs import Job


class KVMetrics:
    """Blocks by state, tokens taken over, and requests that lost their blocks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        blocks = Gauge(
            "moeyard_kv_blocks", "Blocks of keys and values by state", ["state"], registry=registry
        )
        self._used = blocks.labels("used")
        self._cached = blocks.labels("cached")
        self._free = blocks.labels("free")
        self.queries = Counter(
            "moeyard_prefix_cache_queries",
            "Prompt tokens of requests that may take blocks over",
            registry=registry,
        )
        self.hits = Counter(
            "moeyard_prefix_cache_hits", "Prompt tokens that were taken over", registry=registry
        )
        self.preemptions = Counter(
            "moeyard_preemptions", "Requests that lost their blocks to others", registry=registry
        )

    def show(self, pool: BlockPool) -> None:
        """Set the gauges."""
        self._used.set(pool.num_used)
        self._cached.set(pool.num_cached)
        self._free.set(pool.num_free)

    def count_first_start(self, job: Job) -> None:
        """Count what a request has taken over from others when it first got blocks."""
        if job.salt is not None and not job.scores_prompt:
            self.queries.inc(job.num_prompt)
            self.hits.inc(job.num_reused or 0)
