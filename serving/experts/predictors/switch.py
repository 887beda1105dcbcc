"""Does reading ahead pay? Measures forwards with and without it, and switches it off if not."""

import logging
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

log = logging.getLogger(__name__)

WARM_UP = 8
"""Forwards before the first test, while memory fills."""
PLAN = (False,) * 6 + (True,) * 12 + (False,) * 6
"""A test: reading ahead stands between two blocks without, so that a steady change of speed
cancels out."""
SETTLING = 1
"""Forwards of a block that do not count: they use what the block before has read."""
MARGIN = 0.02
"""Reading ahead must be faster by this much."""
CERTAINTY = 0.75
"""Share of all pairs of a forward with it and one without, in which the one with it must be faster.
On a busy machine, where medians say little, chance alone reaches this in one test of forty."""
HOPELESS, SOONEST_VERDICT = 1.1, 3
"""A test ends early when this many forwards that read ahead took this much longer."""
FIRST_RETEST, LAST_RETEST = 256, 8192
"""Forwards until the next test; twice as many after each test that changes nothing. A test of 12
forwards that are 20 % slower than the others costs 1 % of 256."""
SOONEST_RETEST = 128
CHANGED = 2.0
"""Factor by which the experts that a forward must read have changed when a test comes sooner."""


@dataclass(slots=True)
class _State:
    """What is known of forwards of one size."""

    is_on: bool = False
    until_test: int = WARM_UP
    interval: int = FIRST_RETEST
    since_test: int = 0
    step: int | None = None
    """Place in :data:`PLAN` during a test."""
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    reads: float = 0.0
    """Average of experts that a forward needed and had to read."""
    reads_at_test: float = 0.0


class Switch(Protocol):
    """Decides before each forward whether to read ahead."""

    def begin(self, rows: int) -> bool:
        """Return whether a forward of ``rows`` rows should read ahead."""
        ...

    def end(self, seconds: float, reads: int) -> None:
        """Take the forward's seconds, and how many experts it needed that were not in memory.

        Those that were read ahead in time count, too.
        """
        ...


class AlwaysOn:
    """Reads ahead in every forward, for measurements."""

    def begin(self, rows: int) -> bool:
        """Return True."""
        return True

    def end(self, seconds: float, reads: int) -> None:
        """Learn nothing."""


class MeasuringSwitch:
    """Decides for each size of forward, by powers of two of their rows, whether to read ahead.

    The same seconds give the same decisions.
    """

    def __init__(self) -> None:
        self._states: dict[int, _State] = {}
        self._current = _State()
        self._rows = 0

    def begin(self, rows: int) -> bool:
        """See :class:`Switch`."""
        self._rows = rows
        state = self._current = self._states.setdefault(rows.bit_length(), _State())
        if state.step is None and state.until_test <= 0:
            if state.reads > 0:
                state.step, state.seconds = 0, {False: [], True: []}
            else:  # everything is in memory
                state.until_test = FIRST_RETEST
        return state.is_on if state.step is None else PLAN[state.step]

    def end(self, seconds: float, reads: int) -> None:
        """See :class:`Switch`."""
        state = self._current
        state.reads += (reads - state.reads) / 16
        if state.step is not None:
            self._test(state, seconds)
            return
        state.until_test -= 1
        state.since_test += 1
        before, now = state.reads_at_test, state.reads
        has_changed = max(before, now) > 1 + CHANGED * min(before, now)
        if has_changed and state.since_test >= SOONEST_RETEST:
            state.until_test, state.interval = 0, FIRST_RETEST

    def _test(self, state: _State, seconds: float) -> None:
        assert state.step is not None
        is_ahead = PLAN[state.step]
        start = state.step
        while start and PLAN[start - 1] == is_ahead:
            start -= 1
        if state.step - start >= SETTLING:
            state.seconds[is_ahead].append(seconds)
        state.step += 1
        without, ahead = state.seconds[False], state.seconds[True]
        is_hopeless = len(ahead) >= SOONEST_VERDICT and median(ahead) > HOPELESS * median(without)
        if state.step == len(PLAN) or is_hopeless:
            self._decide(state, ahead, without)

    def _decide(self, state: _State, ahead: list[float], without: list[float]) -> None:
        ahead_s, without_s = median(ahead), median(without)
        faster = sum(a < b for a in ahead for b in without) / (len(ahead) * len(without))
        pays = ahead_s < (1 - MARGIN) * without_s and faster >= CERTAINTY
        state.interval = (
            FIRST_RETEST if pays != state.is_on else min(LAST_RETEST, 2 * state.interval)
        )
        state.is_on, state.step = pays, None
        state.until_test, state.since_test = state.interval, 0
        state.reads_at_test = state.reads
        log.info(
            "reading experts ahead %s for forwards of %d rows: %.2f ms with it, %.2f ms without",
            "pays" if pays else "does not pay",
            self._rows,
            1e3 * ahead_s,
            1e3 * without_s,
        )
