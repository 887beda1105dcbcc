"""What an expert store counts."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class LayerTraffic:
    """What one layer asked of the store so far.

    Every expert that was needed is a hit, a miss or a late prefetch. Every prefetch that was
    issued ends as useful, late or wasted.
    """

    hits: int = 0
    """Experts that were in memory when they were needed."""
    misses: int = 0
    """Experts whose read began when they were needed."""
    prefetch_issued: int = 0
    """Reads begun ahead, because a router had already chosen the expert."""
    prefetch_useful: int = 0
    """Prefetched and in memory when needed; these are hits too."""
    prefetch_late: int = 0
    """Prefetched, but still on their way when needed."""
    prefetch_wasted: int = 0
    """Prefetched and put out, cancelled or failed before they were needed."""
    bytes_read: int = 0
    """By prefetches and on demand."""
    prefetch_bytes: int = 0
    """By prefetches."""
    stall_s: float = 0.0
    """Seconds the compute thread waited for reads."""


@dataclass(slots=True)
class StoreStatistics:
    """Counters since start."""

    layers: dict[int, LayerTraffic] = field(default_factory=dict)
    evictions: int = 0

    def num_waits(self) -> int:
        """Return how many experts compute has waited for: misses and late prefetches."""
        return sum(traffic.misses + traffic.prefetch_late for traffic in self.layers.values())
