"""Replay forwards through the store's own code, and count.

L MoE layers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from ....errors import ConfigError
from ....kernels.values.quantized_weights import SlotWeights
from ..policies.policy import CacheFacts, Key, Policy
from ..pools import Pools
from ..predictors.predictor import Predictor, PredictorFacts
from ..predictors.switch import AlwaysOn
from ..read_ahead import Choice
from ..recorded import RecordedForward
from ..store import ExpertStore
from ..traffic import StoreStatistics
from .stand_ins import DiskOnPaper, NoTier, NoWeights

EXPERTS_SHARE = 0.5
"""Of a layer's time, for its experts. The other part, for attention and router, comes before."""

Hints = Callable[[int, int], Iterable[tuple[int, Sequence[int]]]]
"""(number of a forward, place of a MoE layer) -> (layer, its experts) to read ahead from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """A disk and a model of given speeds."""

    read_s: float = 0.0
    """Seconds to read an expert when nothing else is read."""
    layer_s: float = 0.0
    """Seconds that a layer computes."""

    @classmethod
    def of(cls, bytes_per_s: float, expert_bytes: int, layer_s: float) -> "Pace":
        """Return the pace of a disk that is one queue of the given bandwidth."""
        if bytes_per_s <= 0 or layer_s < 0:
            raise ConfigError(
                f"bandwidth is {bytes_per_s:g} bytes/s and layer-time {layer_s:g} s; use a "
                "bandwidth above 0 and a time of 0 or more."
            )
        return cls(read_s=expert_bytes / bytes_per_s, layer_s=layer_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What a store counted, over all layers."""

    hits: int
    misses: int
    late: int
    issued: int
    useful: int
    wasted: int
    evictions: int
    bytes_read: int
    stall_s: float = 0.0
    total_s: float = 0.0
    """Of the replay's clock; 0 without a pace."""
    tokens: int = 0
    tokens_without_miss: int = 0
    """Rows of forwards that waited for no expert."""

    @property
    def waits(self) -> int:
        """Experts that compute waited for."""
        return self.misses + self.late

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def counters_of(statistics: StoreStatistics, **others: Any) -> Counters:
    """Return the sums over layers of a store's counters, with ``others``."""
    stall_s = sum(layer.stall_s for layer in statistics.layers.values())
    return Counters(**statistics.totals(), stall_s=stall_s, **others)


def replay(
    forwards: Iterable[RecordedForward],
    facts: CacheFacts,
    policy: Policy,
    slot_bytes: int = 1,
    pace: Pace | None = None,
    hints: Hints | None = None,
    predictor: tuple[Predictor, PredictorFacts] | None = None,
    pools: Pools | None = None,
) -> Counters:
    """Run forwards through a store that begins empty.

    Without ``pace`` reads take no time. The counters of a run that reads on demand do not depend on
    time, so they are those of the run that was recorded with the same policy and slots.

    ``hints`` are followed in any case, and ``predictor`` is listened to in every forward: a server
    would switch it off while it does not pay. ``pools`` are those of a model whose experts have
    several widths; None = one pool of ``facts.num_slots`` slots of ``slot_bytes``.
    """
    pace = pace or Pace()
    disk = DiskOnPaper(pace.read_s)
    # The store hands the memory on to compute and to the tier, and neither is here.
    memory = cast(SlotWeights, NoWeights())
    pools = pools or Pools((facts.num_slots,), (slot_bytes,))
    memories = [memory] * len(pools)
    store = ExpertStore(facts, pools, memories, NoTier(), disk, policy, disk.clock)
    if predictor is not None:
        store.predict(*predictor, AlwaysOn())
    tokens = without_miss = 0
    for number, recorded in enumerate(forwards):
        waits = store.statistics.num_waits()
        store.begin(recorded.forward)
        for place, rows_of in enumerate(recorded.rows_of_L):
            disk.compute(pace.layer_s * (1 - EXPERTS_SHARE))
            for layer, experts in hints(number, place) if hints is not None else ():
                store.prefetch(layer, experts)
            choice = Choice(None, recorded.experts_NLK[:, place])
            for ready, _ in store.stream(facts.moe_layers[place], rows_of, choice):
                disk.compute(pace.layer_s * EXPERTS_SHARE * len(ready) / len(rows_of))
        tokens += recorded.num_rows
        if store.statistics.num_waits() == waits:
            without_miss += recorded.num_rows
    return counters_of(
        store.statistics,
        total_s=disk.clock(),
        tokens=tokens,
        tokens_without_miss=without_miss,
    )


def all_keys(forwards: Iterable[RecordedForward], facts: CacheFacts) -> Iterable[list[Key]]:
    """Yield what each layer of each forward needs, which Belady's rule must know beforehand."""
    for recorded in forwards:
        yield from recorded.keys(facts.moe_layers)
