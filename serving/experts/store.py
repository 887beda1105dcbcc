"""The expert store: experts on disk, some of them in slots in memory. E experts per layer.

One pool of slots serves all layers, or one for each width of experts (pools.py). A policy
(policies/) says which expert leaves its slot, a tier (tiers/) fills a slot, a queue (read_queue.py)
runs the reads, filler.py brings these together, layer_reads.py follows what a layer needs, and this
file talks to compute. Reads go straight into slots that nothing else uses, while the caller
computes with experts that are ready. What a router chooses early, or a predictor names
(read_ahead.py), is read ahead, behind every read that compute waits for.
"""

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ...kernels.values.quantized_weights import SlotWeights
from ...moe.routes.recorder import OwnColumns
from .channel_filler import ChannelFiller
from .chosen import Choice
from .expectations import Expectations
from .filler import SlotFiller
from .forwards import Forward
from .layer_reads import LayerReads
from .policies.policy import CacheFacts, Key, Policy
from .pools import Pools
from .predictors.predictor import Predictor, PredictorFacts
from .predictors.switch import Switch
from .read_ahead import ReadAhead
from .reading.plan import ReadPlan
from .reads import Reads
from .slots import Slots, StoreCounts
from .tiers.rates import Rates
from .tiers.tier import Tier
from .traffic import StoreStatistics

Ids = Collection[int]
"""Experts of a layer."""


class ExpertStore:
    """Experts behind ``num_slots`` slots. Used by one compute thread.

    Knows no folder and no clock but those it is given, so a replay runs this very code with reads
    that only take time (replay/).
    """

    def __init__(
        self,
        facts: CacheFacts,
        pools: Pools,
        memory: Sequence[SlotWeights],
        tier: Tier,
        reads: Reads,
        policy: Policy,
        clock: Callable[[], float] = time.perf_counter,
        rates: Rates | None = None,
        read_plan: ReadPlan | None = None,
        read_bytes: Callable[[Key], int] | None = None,
    ) -> None:
        """``read_bytes`` is what a read of an expert brings; None = all of it."""
        self.num_slots = facts.num_slots
        self.pools = pools
        self.read_plan = read_plan
        self._memory = memory
        self._weights: dict[tuple[int, int], SlotWeights] = {}
        """Of each layer and pool: to check that they fit takes as long as a small expert."""
        self._slots = Slots(pools, facts.moe_layers, facts.num_experts)
        self._policy = policy
        self._reads = reads
        self._clock = clock
        self.rates = rates or Rates()
        self._expected = Expectations()
        self._ahead: ReadAhead | None = None
        self.channels: ChannelFiller | None = None
        """What brings channels where reads bring gates; None = reads bring whole experts."""
        self.statistics = StoreStatistics(facts.moe_layers, read_bytes or pools.bytes_of)
        self._filler = SlotFiller(
            memory, self._slots, self._expected, policy, tier, reads, self.statistics
        )

    def counts(self) -> StoreCounts:
        """Return what the slots are used for; any thread may ask."""
        self._reads.look()
        return self._slots.counts(self._expected)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert, the largest where widths differ."""
        return max(self.pools.slot_bytes)

    def has(self, layer: int, expert: int) -> bool:
        """Say whether an expert is in memory."""
        return (layer, expert) in self._slots

    def missing(self, layer: int, experts: Ids) -> list[int]:
        """Return those of ``experts`` that compute would have to wait for now."""
        self._filler.book_finished(wanted=())
        return [expert for expert in experts if (layer, expert) not in self._slots]

    def close(self) -> None:
        """Stop the reading threads, and end the log."""
        self._reads.close()
        self.statistics.close()

    def begin(self, forward: Forward) -> None:
        """Hear of a forward before it runs."""
        self.statistics.begin()
        self._policy.begin(forward)
        if self._ahead is not None:
            self._filler.book_finished(wanted=())
            self._ahead.begin(forward)

    def predict(
        self, predictor: Predictor, facts: PredictorFacts, switch: Switch | None = None
    ) -> None:
        """Read ahead what a predictor says, from now on; None = as long as measurements say so."""
        parts = (self._slots, self._filler, self._reads, self.statistics)
        self._ahead = ReadAhead(predictor, facts, *parts, self._clock, switch)

    def start(self, x_ND: Tensor) -> None:
        """Hear which rows enter the model, after :meth:`begin`."""
        if self._ahead is not None:
            self._ahead.start(x_ND)

    def hint_column(self) -> OwnColumns | None:
        """Return the column of hints for a route file; None if no gates are asked ahead."""
        return None if self._ahead is None else self._ahead.column()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read what ``layer`` will need, and keep what is there already.

        Does not wait. As many reads begin as there are slots that nothing known needs; the others
        follow as slots come free.
        """
        self.keep(layer, experts)
        if self._ahead is not None:
            self._ahead.know(layer, experts)
        self._filler.announce(layer, experts)
        self._read_ahead()

    def keep(self, layer: int, experts: Sequence[int]) -> None:
        """Protect what is there of ``experts``: ``layer`` will need it."""
        for expert in experts:
            key = (layer, expert)
            self._expected.expect(key)
            self._policy.expect(key)

    def exchange(self, keys: Collection[Key], swap: Callable[[], None]) -> None:
        """Let ``swap`` change the bytes of experts behind the tier; between two forwards.

        None of them is in memory or being read when it is called. Those that were are read again
        behind everything that compute waits for.
        """
        were_here = self._filler.clear(keys)
        swap()
        for layer, expert in were_here:
            self._filler.announce(layer, [expert])
        self._read_ahead()

    def stream(
        self, layer: int, rows_of: Mapping[int, int], choice: Choice | None = None, copied: Ids = ()
    ) -> Generator[tuple[list[int], SlotWeights]]:
        """Yield all experts of a layer that a forward needs, in waves.

        ``rows_of`` maps them to the number of rows that chose them; ``choice`` is for the
        predictor. Those of ``copied`` are counted and not yielded: the caller has copies. The
        experts of a wave have one width, and its weights stay valid until the next. Resident
        experts come first, while the others are being read. Raises :class:`ExpertReadError` when
        reads fail for good; slots then stay consistent.
        """
        needs = LayerReads(
            *(layer, self._slots, self._filler, self._expected, self._reads, self._policy),
            *(self.statistics, self._clock),
        )
        try:
            ready = needs.begin(rows_of, copied)
            if self._ahead is not None:
                self._ahead.chosen(layer, rows_of, needs.waiting)
            while ready or not needs.is_done:
                needs.read_now(can_wait=bool(ready))
                if choice is not None and self._ahead is not None:  # while the reads run
                    self._ahead.look(layer, choice)
                    choice = None
                self._read_ahead(needs.waiting)
                if ready:
                    yield from self._waves(layer, ready)
                    self._expected.drop((layer, expert) for expert in ready)
                    ready = []
                else:
                    ready = needs.next_ready()
        except BaseException:
            self._expected.clear()  # this forward ends here
            self.statistics.fail()
            raise
        finally:
            needs.end()
        self._read_ahead()
        if self._ahead is not None:
            self._ahead.end_layer(layer)

    def _waves(self, layer: int, ready: list[int]) -> Generator[tuple[list[int], SlotWeights]]:
        """Yield experts that are here, a wave for each width."""
        for pool in range(len(self._memory)):
            experts = [expert for expert in ready if self.pools.of((layer, expert)) == pool]
            if experts:
                yield experts, self._weights_of(layer, pool)

    def _weights_of(self, layer: int, pool: int) -> SlotWeights:
        """Return a layer's experts in a pool; the table of their slots is the one that is kept."""
        found = self._weights.get((layer, pool))
        if found is None:
            table = self._slots.table(layer, pool)
            found = self._weights[layer, pool] = replace(self._memory[pool], slot_of_E=table)
        return found

    def _read_ahead(self, waiting: Collection[int] = ()) -> None:
        """Begin announced reads while there are slots that nothing known needs, then hints'.

        ``waiting`` are needed experts without a slot: hints take none then.
        """
        full = set[int]()
        for key in self._expected.announced():
            pool = self.pools.of(key)
            slot = None if pool in full else self._filler.idle_slot(pool)
            if slot is None:
                full.add(pool)
                if len(full) == len(self.pools):
                    return
                continue
            self._expected.take_announced(key)
            self.statistics.prefetch(key)
            self._filler.submit(key, slot, is_urgent=False)
        if self._ahead is not None and not waiting:
            self._ahead.read()
