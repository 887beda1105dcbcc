"""The expert store: experts on disk, some of them in slots in memory. E experts per layer.

One pool of slots serves all layers. A policy (policies/) says which expert leaves its slot, a tier
(tiers/) fills a slot, a queue (read_queue.py) runs the reads, filler.py brings these together, and
this file talks to compute. Reads go straight into slots that nothing else uses, while the caller
computes with experts that are ready. What a router chooses early, or a predictor names
(read_ahead.py), is read ahead, behind every read that compute waits for.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace

from ...kernels.values.quantized_weights import SlotWeights
from ...moe.routes.recorder import OwnColumns
from .expectations import Expectations
from .filler import SlotFiller
from .forwards import Forward
from .policies.errors import no_victim
from .policies.policy import CacheFacts, Key, Policy
from .predictors.predictor import Predictor, PredictorFacts
from .predictors.switch import Switch
from .read_ahead import Choice, ReadAhead
from .reading.errors import read_error
from .reading.plan import ReadPlan
from .reads import Read, Reads
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
        slot_bytes: int,
        memory: SlotWeights,
        tier: Tier,
        reads: Reads,
        policy: Policy,
        clock: Callable[[], float] = time.perf_counter,
        rates: Rates | None = None,
        read_plan: ReadPlan | None = None,
    ) -> None:
        self.num_slots = facts.num_slots
        self.slot_bytes = slot_bytes
        self.read_plan = read_plan
        self._memory = memory
        self._slots = Slots(facts.num_slots, facts.moe_layers, facts.num_experts)
        self._policy = policy
        self._reads = reads
        self._clock = clock
        self.rates = rates or Rates()
        self._expected = Expectations()
        self._ahead: ReadAhead | None = None
        self.statistics = StoreStatistics(facts.moe_layers, slot_bytes)
        self._filler = SlotFiller(
            memory, self._slots, self._expected, policy, tier, reads, self.statistics
        )

    def counts(self) -> StoreCounts:
        """Return what the slots are used for; any thread may ask."""
        return self._slots.counts(self._expected)

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

    def hint_column(self) -> OwnColumns | None:
        """Return the column of hints for a route file; None if no gates are asked ahead."""
        return None if self._ahead is None else self._ahead.column()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read what ``layer`` will need, and keep what is there already.

        Does not wait. As many reads begin as there are slots that nothing known needs; the others
        follow as slots come free.
        """
        self.keep(layer, experts)
        self._filler.announce(layer, experts)
        self._read_ahead()

    def keep(self, layer: int, experts: Sequence[int]) -> None:
        """Protect what is there of ``experts``: ``layer`` will need it."""
        for expert in experts:
            key = (layer, expert)
            self._expected.expect(key)
            self._policy.expect(key)

    def stream(
        self, layer: int, rows_of: Mapping[int, int], choice: Choice | None = None, copied: Ids = ()
    ) -> Generator[tuple[list[int], SlotWeights]]:
        """Yield all experts of a layer that a forward needs, in waves.

        ``rows_of`` maps them to the number of rows that chose them; ``choice`` is for the
        predictor. Those of ``copied`` are counted and not yielded: the caller has copies. The
        weights of a wave stay valid until the next. Resident experts come first, while the others
        are being read. Raises :class:`ExpertReadError` when reads fail for good; slots then stay
        consistent.
        """
        reading: dict[Key, Read] = {}
        try:
            ready, waiting = self._begin(layer, rows_of, reading, copied)
            while ready or waiting or reading:
                self._filler.book_finished(wanted=reading)
                self._read_now(layer, waiting, reading, can_wait=bool(ready))
                if choice is not None and self._ahead is not None:  # while the reads run
                    self._ahead.look(layer, choice)
                    choice = None
                self._read_ahead(waiting)
                if ready:
                    yield ready, replace(self._memory, slot_of_E=self._slots.table(layer))
                    self._expected.drop((layer, expert) for expert in ready)
                    ready = []
                else:
                    ready = self._next_ready(layer, reading, in_order=bool(waiting))
        except BaseException:
            self._expected.clear()  # this forward ends here
            self.statistics.fail()
            raise
        finally:
            # Whatever ended the wave, no thread may write into a slot that is given away.
            self._reads.wait_for_all(reading.values())
            for read in reading.values():
                self._filler.book(read)
        self._read_ahead()
        if self._ahead is not None:
            self._ahead.end_layer(layer)

    def _begin(
        self, layer: int, rows_of: Mapping[int, int], reading: dict[Key, Read], copied: Ids
    ) -> tuple[list[int], deque[int]]:
        """Return which experts are here and which must be read; make those under way urgent."""
        self._filler.book_finished(wanted=reading)
        self._expected.drop_layer(layer)
        ready, waiting = [], deque[int]()
        for expert, rows in rows_of.items():
            key = (layer, expert)
            self._policy.touch(key, rows)
            if expert in copied:
                self.statistics.copy(key, rows)
                continue
            self._expected.expect(key)
            read = self._slots.filling(key)
            if key in self._slots:
                ready.append(expert)
                self.statistics.hit(key)
            elif read is not None and self._reads.make_urgent(read):
                reading[key] = read
                self.statistics.late(key)
            else:
                if read is not None:  # it was dropped
                    self._filler.book(read)
                waiting.append(expert)
                self.statistics.miss(key)
        self.statistics.need(layer, rows_of)
        if self._ahead is not None:
            self._ahead.chosen(layer, rows_of, waiting)
        return ready, waiting

    def _read_now(
        self, layer: int, waiting: deque[int], reading: dict[Key, Read], can_wait: bool
    ) -> None:
        """Begin reads that compute waits for; ``can_wait`` says that it has other work to do."""
        while waiting:
            slot = self._filler.idle_slot()
            if slot is None and not (can_wait or reading):
                slot = self._filler.slot_of_prefetch()
            if slot is None:
                return
            key = (layer, waiting.popleft())
            reading[key] = self._filler.submit(key, slot, is_urgent=True)

    def _read_ahead(self, waiting: Collection[int] = ()) -> None:
        """Begin announced reads while there are slots that nothing known needs, then hints'.

        ``waiting`` are needed experts without a slot: hints take none then.
        """
        while self._expected.num_announced:
            slot = self._filler.idle_slot()
            if slot is None:
                return
            key = self._expected.next_announced()
            self.statistics.prefetch(key)
            self._filler.submit(key, slot, is_urgent=False)
        if self._ahead is not None and not waiting:
            self._ahead.read()

    def _next_ready(self, layer: int, reading: dict[Key, Read], in_order: bool) -> list[int]:
        """Wait for reads and return the experts that came.

        ``in_order`` returns the one whose read began first: while others wait for slots, the order
        decides which slots come free. If none of ``reading`` is under way, wait until any prefetch
        is done and its slot usable.
        """
        if not (reading or self._slots.all_filling()):
            raise no_victim(self._policy)
        started = self._clock()
        wanted = list(reading.values())[: 1 if in_order else None] or self._slots.all_filling()
        finished = self._reads.wait_for_any(wanted)
        self.statistics.stall(layer, self._clock() - started)
        ready, failed = list[Read](), list[Read]()
        for read in finished:
            self._filler.book(read)
            if reading.pop(read.key, None) is not None:
                (ready if read.error is None else failed).append(read)
        if failed:
            # The others under way are waited for in any case, so one error names all that failed.
            self._reads.wait_for_all(reading.values())
            failed += [read for read in reading.values() if read.error is not None]
            raise read_error(failed)
        return sorted(read.key[1] for read in ready)
