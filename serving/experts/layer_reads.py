"""What one layer of a forward needs: what is here, what is read, what waits for a slot."""

from collections import deque
from collections.abc import Callable, Collection, Mapping

from .expectations import Expectations
from .filler import SlotFiller
from .policies.errors import no_victim
from .policies.policy import Key, Policy
from .reading.errors import read_error
from .reads import Read, Reads
from .slots import Slots
from .traffic import StoreStatistics


class LayerReads:
    """The reads of one layer, from the choice of its router to the last expert."""

    def __init__(
        self,
        layer: int,
        slots: Slots,
        filler: SlotFiller,
        expected: Expectations,
        reads: Reads,
        policy: Policy,
        statistics: StoreStatistics,
        clock: Callable[[], float],
    ) -> None:
        self._layer = layer
        self._slots, self._filler, self._expected = slots, filler, expected
        self._reads, self._policy, self._statistics = reads, policy, statistics
        self._clock = clock
        self.waiting: deque[int] = deque()
        """Experts that have no slot yet."""
        self.reading: dict[Key, Read] = {}
        """Reads that compute waits for, in the order they began."""

    @property
    def is_done(self) -> bool:
        """Say whether there is nothing to come."""
        return not (self.waiting or self.reading)

    def begin(self, rows_of: Mapping[int, int], copied: Collection[int] = ()) -> list[int]:
        """Return which experts are here; make urgent what is on its way.

        Those of ``copied`` are only counted: compute has copies of them.
        """
        self._filler.book_finished(wanted=self.reading)
        self._expected.drop_layer(self._layer)
        ready = []
        for expert, rows in rows_of.items():
            key = (self._layer, expert)
            self._policy.touch(key, rows)
            if expert in copied:
                self._statistics.copy(key, rows)
                continue
            self._expected.expect(key)
            read = self._slots.filling(key)
            if key in self._slots:
                ready.append(expert)
                self._statistics.hit(key)
            elif read is not None and self._reads.make_urgent(read):
                self.reading[key] = read
                self._statistics.late(key)
            else:
                if read is not None:  # it was dropped
                    self._filler.book(read)
                self.waiting.append(expert)
                self._statistics.miss(key)
        self._statistics.need(self._layer, rows_of)
        return ready

    def read_now(self, can_wait: bool) -> None:
        """Begin the reads for which there are slots.

        ``can_wait`` says that compute has other work to do.
        """
        self._filler.book_finished(wanted=self.reading)
        full = set[int]()
        for expert in tuple(self.waiting):
            key = (self._layer, expert)
            pool = self._slots.pools.of(key)
            if pool in full:
                continue
            slot = self._filler.idle_slot(pool)
            if slot is None and not (can_wait or self.reading):
                slot = self._filler.slot_of_prefetch(pool)
            if slot is None:
                full.add(pool)
                continue
            self.waiting.remove(expert)
            self.reading[key] = self._filler.submit(key, slot, is_urgent=True)

    def next_ready(self) -> list[int]:
        """Wait for reads and return the experts that came.

        While others wait for slots, that is the one whose read began first: the order decides which
        slots come free. If no read of the layer is under way, wait until any prefetch is done and
        its slot usable. Raises :class:`ExpertReadError`.
        """
        if not (self.reading or self._slots.all_filling()):
            raise no_victim(self._policy)
        started = self._clock()
        first = 1 if self.waiting else None
        wanted = list(self.reading.values())[:first] or self._slots.all_filling()
        finished = self._reads.wait_for_any(wanted)
        self._statistics.stall(self._layer, self._clock() - started)
        ready, failed = list[Read](), list[Read]()
        for read in finished:
            self._filler.book(read)
            if self.reading.pop(read.key, None) is not None:
                (ready if read.error is None else failed).append(read)
        if failed:
            # The others under way are waited for in any case, so one error names all that failed.
            self._reads.wait_for_all(self.reading.values())
            failed += [read for read in self.reading.values() if read.error is not None]
            raise read_error(failed)
        return sorted(read.key[1] for read in ready)

    def end(self) -> None:
        """Wait for all reads: no thread may write into a slot that is given away."""
        self._reads.wait_for_all(self.reading.values())
        for read in self.reading.values():
            self._filler.book(read)
