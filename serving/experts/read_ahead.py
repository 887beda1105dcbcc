"""Reading ahead of what routers will choose: hints, and what becomes of them. N rows, K choices.

After a layer's choice the predictor says what the next layers may need. What is in memory of that
is kept from leaving; the rest is read behind everything that compute waits for, as far as it is
worth it (predictors/admission.py). When a layer's true choice arrives, its other hints are dropped.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from ...moe.routes.recorder import OwnColumns
from .chosen import Choice
from .filler import SlotFiller
from .forwards import Forward
from .policies.policy import Key
from .predictors.admission import (
    SMALLEST_GAIN,
    Calibration,
    Outcomes,
    Regret,
    Windows,
    bucket_of,
    gain_of,
    order_of,
)
from .predictors.hint_column import HintColumn
from .predictors.next_gates import NextGates
from .predictors.predictor import Hint, Predictor, PredictorFacts
from .predictors.switch import MeasuringSwitch, Switch
from .reads import Read, Reads
from .slots import Slots
from .traffic import StoreStatistics

UNSEEN = 8
"""While reading ahead is switched off, a predictor sees one forward in this many: it goes on
learning, at an eighth of the cost."""


@dataclass(slots=True)
class _Moment:
    """The latest beginning of a forward, or choice of a layer."""

    number: int
    """0 at the beginning, then the number of the layer from 1 on; see :class:`Windows`."""
    at: float
    stall_s: float
    """Of the store until then."""


class ReadAhead:
    """Turns a predictor's hints into reads. Used by the store, in its compute thread."""

    def __init__(
        self,
        predictor: Predictor,
        facts: PredictorFacts,
        slots: Slots,
        filler: SlotFiller,
        reads: Reads,
        statistics: StoreStatistics,
        clock: Callable[[], float],
        switch: Switch | None = None,
    ) -> None:
        self._predictor = predictor
        self._facts = facts
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        self._slots, self._filler, self._reads = slots, filler, reads
        self._statistics = statistics
        self._clock = clock
        self._switch = switch or MeasuringSwitch()
        self._calibration, self._regret = Calibration(), Regret()
        self._windows = Windows(len(facts.moe_layers))
        self._given: dict[int, dict[int, dict[int, Outcomes]]] = {}
        """Hints whose outcome is not known, by target layer, distance and expert."""
        self._pending: dict[Key, float] = {}
        """The chances of hints that are neither in memory nor on their way."""
        self._reading: dict[Key, Read] = {}
        """Reads of hints that were not needed yet."""
        self._num_ended = 0
        """Reads of the store that had ended when reads were begun the last time."""
        self._is_on = self._sees = self._may_begin = False
        self._began = 0.0
        self._num_forwards = self._size = self._num_read = 0
        self._moment = _Moment(0, 0.0, 0.0)

    def column(self) -> OwnColumns | None:
        """Return the column for a route file that has what was named ahead, if it can be had."""
        if self._facts.known or not isinstance(self._predictor, NextGates):
            return None
        return HintColumn(self._facts, self._predictor)

    def begin(self, forward: Forward) -> None:
        """A forward begins: take hints for its first layer."""
        for layer in [layer for layer in self._given if layer != self._facts.moe_layers[0]]:
            self._end_hints(layer, needed=None)  # the forward before has failed
        rows = sum(forward.lengths)
        self._size = rows.bit_length()
        self._is_on = self._switch.begin(rows)
        self._sees = self._is_on or self._num_forwards % UNSEEN == 0
        self._num_forwards += 1
        self._num_read = self._statistics.num_read()
        self._pass_moment(0)
        if not self._sees:
            return
        self._regret.begin()
        hints = self._predictor.begin(forward)
        if self._is_on:
            self._windows.progressed(*self._reads.progress())
            self._take(hints, place=-1)
            self.read()

    def start(self, x_ND: Tensor) -> None:
        """Take hints from the rows that enter the model, of the forward that has begun."""
        if self._is_on and isinstance(self._predictor, NextGates):
            self._take(self._predictor.at_input(x_ND), place=-1)
            self.read()

    def know(self, layer: int, needed: Collection[int]) -> None:
        """Hear what ``layer`` has chosen before it runs: its hints end."""
        self._end_hints(layer, needed)

    def chosen(self, layer: int, needed: Collection[int], missing: Collection[int]) -> None:
        """``layer`` needs some experts, and ``missing`` of them are neither here nor coming."""
        if self._sees:
            self._pass_moment(self._place_of[layer] + 1)
            self._regret.missed(layer, missing)
        self._end_hints(layer, needed)

    def look(self, layer: int, choice: Choice) -> None:
        """Let the predictor see a choice, and take its hints."""
        if not self._sees:
            return
        self._predictor.see(layer, choice.experts_NK)
        if self._is_on:
            self._take(self._predictor.after_choice(layer, choice.x_ND), self._place_of[layer])

    def read(self) -> None:
        """Begin the reads that are worth it: those of the next layer first, the likeliest first.

        Time makes no hint worth more. So they are looked at again only when others came, when a
        read has ended, or while they want for slots.
        """
        is_news = self._may_begin or self._num_ended != self._filler.num_ended
        if not (self._pending and is_news):
            return
        self._num_ended = self._filler.num_ended
        self._reading = {k: read for k, read in self._reading.items() if not read.is_done}
        backlog = sum(read.left for read in self._reading.values())
        self._may_begin = False
        if not self._windows.may_begin(backlog):
            return
        elapsed_s = self._clock() - self._moment.at
        elapsed_s -= self._statistics.stall_s - self._moment.stall_s
        left_s: dict[int, float] = {}
        full = set[int]()
        for key, chance in sorted(self._pending.items(), key=self._order):
            if not self._windows.may_begin(backlog):
                break
            if key in self._slots.resident or self._slots.is_filling(key):
                del self._pending[key]  # compute has asked for it since
                continue
            if key[0] not in left_s:
                moments = self._moment.number, self._place_of[key[0]] + 1
                left_s[key[0]] = self._windows.seconds_to(self._size, *moments) - elapsed_s
            share = self._windows.share_in_time(left_s[key[0]], backlog)
            pool = self._slots.pools.of(key)
            victim_chance = 0.0 if self._slots.num_free(pool) else self._regret.chance
            if pool in full or gain_of(chance, share, victim_chance) < SMALLEST_GAIN:
                continue
            slot = self._filler.slot_for_hint(pool, self._regret.left)
            if slot is None:
                full.add(pool)
                continue
            del self._pending[key]
            self._statistics.prefetch(key)
            self._reading[key] = self._filler.submit(key, slot, is_urgent=False)
            self._filler.likely.add(key)
            backlog += 1
        self._may_begin = bool(full)

    def _order(self, hint: tuple[Key, float]) -> tuple[bool, int, float]:
        (layer, _), chance = hint
        distance = (self._place_of[layer] - self._moment.number) % len(self._place_of)
        return order_of(chance, distance)

    def end_layer(self, layer: int) -> None:
        """``layer`` has all it needs; after the last one, the forward's time is known."""
        if layer == self._facts.moe_layers[-1]:
            num_read = self._statistics.num_read() - self._num_read
            self._switch.end(self._clock() - self._began, num_read)

    def _pass_moment(self, number: int) -> None:
        """Learn how long compute took since the last moment."""
        now, stall_s, last = self._clock(), self._statistics.stall_s, self._moment
        if number == 0:
            self._began = now
        if number == (last.number + 1) % (len(self._place_of) + 1):
            self._windows.passed(self._size, last.number, now - last.at - stall_s + last.stall_s)
        self._moment = _Moment(number, now, stall_s)

    def _take(self, hints: list[Hint], place: int) -> None:
        """Keep what is in memory of ``hints``, and let the rest wait for :meth:`read`.

        ``place`` is the number of the layer that has just chosen, -1 before the first one.
        """
        regret, resident = self._regret.chance, self._slots.resident
        self._may_begin = True
        for layer, own in groupby(hints, key=_layer_of):
            distance = 0 if place < 0 else max(0, self._place_of[layer] - place)
            given = self._given.setdefault(layer, {}).setdefault(distance, {})
            for key in [key for key in self._pending if key[0] == layer]:
                del self._pending[key]  # from further away, so less sure
            here = self._calibration.kinds(distance, is_resident=True)
            there = self._calibration.kinds(distance, is_resident=False)
            for key, score in own:
                is_resident = key in resident
                outcomes = (here if is_resident else there)[bucket_of(score)]
                given[key[1]] = outcomes
                chance = outcomes.chance(score)
                if is_resident:
                    if chance > regret:
                        self._filler.likely.add(key)
                elif chance >= SMALLEST_GAIN and not self._slots.is_filling(key):
                    self._pending[key] = chance

    def _end_hints(self, layer: int, needed: Collection[int] | None) -> None:
        """Count a layer's hints and drop those that were wrong; all if ``needed`` is None."""
        for distance, given in self._given.pop(layer, {}).items():
            right = 0
            for expert, outcomes in given.items():
                key = (layer, expert)
                is_right = needed is not None and expert in needed
                right += is_right
                if needed is not None:
                    outcomes.add(is_right)
                self._filler.likely.discard(key)
                self._pending.pop(key, None)
                read = self._reading.pop(key, None)
                if read is not None and not is_right and not read.is_done:
                    self._filler.drop(read)
            if needed is not None:
                self._statistics.hints(distance, len(given), right, len(needed))


def _layer_of(hint: Hint) -> int:
    return hint.key[0]
