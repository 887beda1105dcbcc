"""Which hints are worth a read now: chances, measured time and measured speed."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..policies.policy import Key

BUCKETS = 10
"""Of scores, from 0 to 1."""
TRUST = 8.0
"""Hints that a predictor's own score counts for, next to those whose outcome is known."""
MOST_HINTS = 4096.0
"""Outcomes of a bucket after which they are halved, so that what is learned can change."""
SMALLEST_GAIN = 0.2
"""Expected share of a read that compute need not wait for. On a model of 8 layers, 0.1, 0.2 and 0.3
were as fast as one another; 0.1 read more that was not needed."""
WRONG = 0.1
"""What a wrong read costs in bandwidth, as a share of a read: others stand behind its parts."""
REACH = 2.0
"""Reads are admitted for so many times the time there is: a late one has at least begun, and
compute waits now and then. In replays an oracle is 1.43 times as fast as reading on demand with 2,
and 1.37 times with 1; predictors are as fast with both."""
LIKELY = 0.5
"""Likelier hints are read in the order of the layers, before the others."""
FEWEST_BEGUN, BEGUN_S = 2, 2e-3
"""Early reads under way or in the queue: so many, or as many as the disk brings in these seconds.
What stands in the queue is not taken back for something better. With a model of 8 layers of 16
experts of 1.6 MB, an order by layers and 2 reads were 1.24 times as fast as reading on demand, an
order by chances alone and any number of reads 1.19 times; rounds differ by as much."""
LONGEST_S = 0.1
"""A longer pause between two forwards is one without requests."""
WEIGHT = 0.1
"""Of the newest value in an average."""


@dataclass(slots=True)
class Outcomes:
    """What became of hints of one kind."""

    given: float = 0.0
    right: float = 0.0

    def chance(self, score: float) -> float:
        """Return the chance that a hint of this kind comes true; ``score`` is the predictor's."""
        return (self.right + TRUST * score) / (self.given + TRUST)

    def add(self, is_right: bool) -> None:
        """Count the outcome of a hint."""
        if self.given >= MOST_HINTS:
            self.given, self.right = self.given / 2, self.right / 2
        self.given += 1
        self.right += is_right


class Calibration:
    """Measures how often hints come true, by distance, score, and whether the expert was there.

    An expert that memory holds was needed lately, so a hint of it is right more often.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[int, bool], list[Outcomes]] = {}

    def kinds(self, distance: int, is_resident: bool) -> list[Outcomes]:
        """Return the outcomes of a distance by :func:`bucket_of` the score."""
        found = self._of.get((distance, is_resident))
        if found is None:
            found = self._of[distance, is_resident] = [Outcomes() for _ in range(BUCKETS + 1)]
        return found


def bucket_of(score: float) -> int:
    """Return the place of a score, from 0 to 1, in :meth:`Calibration.kinds`."""
    return int(score * BUCKETS)


class Regret:
    """Measures how often an expert that left for a hint is needed within one forward."""

    def __init__(self) -> None:
        self._left: dict[Key, int] = {}
        """By expert: the forward in which it left."""
        self._forward = 0
        self._outcomes = [4.0, 0.4]
        """Experts that left, and those of them that were needed. It starts with a guess."""

    @property
    def chance(self) -> float:
        """The chance that the next one will be needed."""
        return self._outcomes[1] / self._outcomes[0]

    def begin(self) -> None:
        """Hear of a forward: what left two forwards ago was not needed."""
        self._forward += 1
        if len(self._left) > 0:
            self._left = {k: at for k, at in self._left.items() if at >= self._forward - 1}

    def left(self, key: Key) -> None:
        """Count an expert that leaves for a hint."""
        if self._outcomes[0] >= MOST_HINTS:
            self._outcomes = [value / 2 for value in self._outcomes]
        self._outcomes[0] += 1
        self._left[key] = self._forward

    def missed(self, layer: int, experts: Iterable[int]) -> None:
        """Count needed experts that are not in memory."""
        if not self._left:
            return
        for expert in experts:
            if self._left.pop((layer, expert), None) is not None:
                self._outcomes[1] += 1


class Windows:
    """Measures the compute time between the moments of a forward, and the speed of reading.

    Moment 0 is the beginning of a forward, moment n the choice of its n-th MoE layer. After the
    last one comes the beginning of the next forward.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_moments = num_layers + 1
        self._seconds: dict[tuple[int, int], float] = {}
        """By size of the forward and moment: until the next moment."""
        self._rate: float | None = None
        self._last_progress = (0.0, 0.0)

    @property
    def rate(self) -> float | None:
        """Experts a second that the disk brings; None until it was measured."""
        return self._rate

    def passed(self, size: int, moment: int, seconds: float) -> None:
        """Learn the seconds between a moment and the next one, stalls left out."""
        seconds = min(seconds, LONGEST_S)
        old = self._seconds.get((size, moment))
        new = seconds if old is None else old + WEIGHT * (seconds - old)
        self._seconds[size, moment] = new

    def progressed(self, reads: float, busy_s: float) -> None:
        """Learn the speed of reading from totals of reads and busy seconds."""
        new_reads, new_s = reads - self._last_progress[0], busy_s - self._last_progress[1]
        if new_reads < 1 or new_s <= 0:
            return
        self._last_progress = (reads, busy_s)
        rate = new_reads / new_s
        self._rate = rate if self._rate is None else self._rate + WEIGHT * (rate - self._rate)

    def may_begin(self, backlog: float) -> bool:
        """Say whether one more early read may stand behind ``backlog`` others, in experts."""
        return backlog < max(FEWEST_BEGUN, BEGUN_S * (self._rate or 0.0))

    def seconds_to(self, size: int, moment: int, target: int) -> float:
        """Return the expected compute seconds from one moment to a later one."""
        ahead = (target - moment) % self._num_moments
        moments = ((moment + step) % self._num_moments for step in range(ahead))
        return sum(self._seconds.get((size, m), 0.0) for m in moments)

    def share_in_time(self, seconds: float, backlog: float) -> float:
        """Return the share of one more read that is worth beginning, for compute seconds left.

        ``backlog`` are the early reads in front of it, in experts. Reads that compute waits for are
        done while it stands still, so they take nothing from these seconds.
        """
        if self._rate is None:
            return 1.0 if backlog < 1 else 0.0
        return min(1.0, max(0.0, REACH * seconds * self._rate - backlog))


def order_of(chance: float, distance: int) -> tuple[bool, int, float]:
    """Return by what hints are sorted; ``distance`` is in layers."""
    return chance < LIKELY, distance, -chance


def gain_of(chance: float, share_in_time: float, victim_chance: float) -> float:
    """Return the expected share of a read that is saved.

    If the hint is right, the read would put out the same expert later; if it is wrong, that expert
    may have to be read again.
    """
    return chance * share_in_time - (1 - chance) * (victim_chance + WRONG)
