"""What an expert store counts."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from .event_log import ADMIT, ARRIVE, DROP, EVICT, FAILED, FORWARD, NEED, EventLog
from .policies.policy import Key


@dataclass(slots=True)
class LayerTraffic:
    """What one layer asked of the store so far.

    Every expert that was needed is a hit, a miss, a late prefetch or computed from a copy. Every
    prefetch that was issued ends as useful, late or wasted.
    """

    hits: int = 0
    """Experts that were in memory when they were needed."""
    misses: int = 0
    """Experts whose read began when they were needed."""
    filled: int = 0
    """Experts of these whose slot lacked channels that some row needed; they were then read."""
    copied: int = 0
    """Experts that were not in memory and were computed from a low-bit copy (fallback.py)."""
    copied_rows: int = 0
    """Rows of these experts: pairs of a row and an expert."""
    prefetch_issued: int = 0
    """Reads begun ahead, because a router had already chosen the expert, or after a copy of it was
    used."""
    prefetch_useful: int = 0
    """Prefetched and in memory when needed; these are hits too."""
    prefetch_late: int = 0
    """Prefetched, but still on their way when needed."""
    prefetch_wasted: int = 0
    """Prefetched and put out, cancelled or failed before they were needed."""
    bytes_read: int = 0
    """By prefetches and on demand, channels included."""
    channel_bytes: int = 0
    """By reads of channels that some row needed."""
    prefetch_bytes: int = 0
    """By prefetches."""
    stall_s: float = 0.0
    """Seconds the compute thread waited for reads."""


@dataclass(slots=True)
class HintTraffic:
    """What hints of one distance came to; an expert counts once for each forward and layer."""

    hinted: int = 0
    """Experts that a predictor named."""
    right: int = 0
    """Those of them that were needed."""
    needed: int = 0
    """Experts that layers with such hints needed: ``right / needed`` is the recall."""


class StoreStatistics:
    """Counters since start. Each method books one event, most of them of one expert."""

    def __init__(self, layers: Iterable[int], bytes_of: Callable[[Key], int]) -> None:
        self.layers = {layer: LayerTraffic() for layer in layers}
        self.evictions = 0
        self.log: EventLog | None = None
        """Where events are written, too."""
        self.stall_s = 0.0
        """Of all layers."""
        self.copied_tokens = 0
        """Rows of forwards that were computed with at least one copy of an expert."""
        self.hint_traffic: dict[int, HintTraffic] = {}
        """By distance in MoE layers; 0 = named before the first layer."""
        self._bytes_of = bytes_of
        self._unused: set[Key] = set()
        """Prefetched, read or being read, and not needed so far."""

    def num_read(self) -> int:
        """Return how many needed experts came from the tier, ahead of need or not."""
        return sum(
            traffic.misses + traffic.prefetch_late + traffic.prefetch_useful
            for traffic in self.layers.values()
        )

    def num_waits(self) -> int:
        """Return how often compute has waited: for misses, late prefetches and channels."""
        return sum(
            traffic.misses + traffic.prefetch_late + traffic.filled
            for traffic in self.layers.values()
        )

    def totals(self) -> dict[str, int]:
        """Return the counters that a replay knows, summed over layers."""
        layers = self.layers.values()
        return {
            "hits": sum(layer.hits for layer in layers),
            "misses": sum(layer.misses for layer in layers),
            "late": sum(layer.prefetch_late for layer in layers),
            "issued": sum(layer.prefetch_issued for layer in layers),
            "useful": sum(layer.prefetch_useful for layer in layers),
            "wasted": sum(layer.prefetch_wasted for layer in layers),
            "evictions": self.evictions,
            "bytes_read": sum(layer.bytes_read for layer in layers),
        }

    def close(self) -> None:
        """End the log."""
        if self.log is not None:
            self.log.close(self.totals())

    def begin(self) -> None:
        """A forward begins."""
        self._note(FORWARD)

    def fail(self) -> None:
        """A forward has ended before its time."""
        self._note(FAILED)

    def need(self, layer: int, experts: Collection[int]) -> None:
        """A layer needs experts; each is a hit, late or a miss."""
        self._note(NEED, layer, *experts)

    def stall(self, layer: int, seconds: float) -> None:
        """Compute has waited for reads."""
        self.layers[layer].stall_s += seconds
        self.stall_s += seconds

    def hints(self, distance: int, hinted: int, right: int, needed: int) -> None:
        """A layer's choice has come, and so the outcome of its hints."""
        traffic = self.hint_traffic.setdefault(distance, HintTraffic())
        traffic.hinted += hinted
        traffic.right += right
        traffic.needed += needed

    def hit(self, key: Key) -> None:
        """Needed, and in memory."""
        traffic = self.layers[key[0]]
        traffic.hits += 1
        if key in self._unused:
            self._unused.discard(key)
            traffic.prefetch_useful += 1

    def late(self, key: Key) -> None:
        """Needed, and on its way."""
        self._unused.discard(key)
        self.layers[key[0]].prefetch_late += 1

    def miss(self, key: Key) -> None:
        """Needed, and neither in memory nor on its way."""
        self.layers[key[0]].misses += 1

    def copy(self, key: Key, rows: int) -> None:
        """Needed, not in memory, and computed from a copy."""
        self.layers[key[0]].copied += 1
        self.layers[key[0]].copied_rows += rows

    def prefetch(self, key: Key) -> None:
        """A read begins ahead of need."""
        self._unused.add(key)
        self.layers[key[0]].prefetch_issued += 1
        self._note(ADMIT, *key)

    def read(self, key: Key, is_prefetch: bool) -> None:
        """A read has brought its expert."""
        traffic = self.layers[key[0]]
        num_bytes = self._bytes_of(key)
        traffic.bytes_read += num_bytes
        if is_prefetch:
            traffic.prefetch_bytes += num_bytes
        self._note(ARRIVE, *key)

    def fill(self, key: Key, num_bytes: int) -> None:
        """Channels of an expert have been read, because some row needed them."""
        traffic = self.layers[key[0]]
        traffic.filled += 1
        traffic.channel_bytes += num_bytes
        traffic.bytes_read += num_bytes

    def lose(self, key: Key) -> None:
        """A read is cancelled or has failed."""
        self._waste(key)
        self._note(DROP, *key)

    def put_out(self, key: Key) -> None:
        """An expert leaves its slot."""
        self.evictions += 1
        self._waste(key)
        self._note(EVICT, *key)

    def _waste(self, key: Key) -> None:
        if key in self._unused:
            self._unused.discard(key)
            self.layers[key[0]].prefetch_wasted += 1

    def _note(self, kind: str, *values: int) -> None:
        if self.log is not None:
            self.log.add(kind, *values)
