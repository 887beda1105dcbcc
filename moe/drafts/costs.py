"""What a further row of a step costs, measured, and how many rows are worth it."""

from collections.abc import Sequence as Items
from heapq import heappop, heappush

WEIGHT = 0.02
"""Of a new step in the averages: about the last 50 steps count."""
LONGEST = 4.0
"""Steps that take longer than this many average ones count as that: the machine was busy."""


class StepCosts:
    """A line through the seconds of recent steps over their rows, which all generated a token.

    Averages, variance and covariance forget with the same weight. So steps that all have the same
    rows leave the slope as it was.
    """

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0
        self._variance = self._covariance = 0.0
        self._num_steps = 0

    def add(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if self._num_steps:
            seconds = min(seconds, LONGEST * self._seconds)
        self._num_steps += 1
        weight = max(WEIGHT, 1 / self._num_steps)
        more, longer = rows - self._rows, seconds - self._seconds
        self._rows += weight * more
        self._seconds += weight * longer
        self._variance = (1 - weight) * (self._variance + weight * more * more)
        self._covariance = (1 - weight) * (self._covariance + weight * more * longer)

    @property
    def per_row(self) -> float:
        """Seconds that one more row takes; 0 until steps of different sizes were seen."""
        return 0.0 if self._variance == 0 else max(0.0, self._covariance / self._variance)

    def seconds(self, rows: int) -> float:
        """Return the expected seconds of a step."""
        return max(self._seconds + self.per_row * (rows - self._rows), self.per_row * rows)


def share_rows(
    chances: Items[Items[float]], num_texts: int, costs: StepCosts, most_rows: int
) -> list[int]:
    """Return how many drafted ids of each text should run, at most ``most_rows`` in all.

    ``chances`` has for each text the chances of :meth:`.TextDrafts.guess`. ``num_texts`` rows run
    anyway and bring a token each. The likeliest id is added first, as long as tokens per second
    rise: as long as its chance is above the tokens that the step brings in the time of one row.
    """
    counts = [0] * len(chances)
    tokens, seconds = float(num_texts), costs.seconds(num_texts)
    queue: list[tuple[float, int]] = []
    for text, own in enumerate(chances):
        if own:
            heappush(queue, (-own[0], text))
    while queue and sum(counts) < most_rows:
        chance, text = heappop(queue)
        if -chance * seconds <= costs.per_row * tokens:
            break
        counts[text] += 1
        tokens -= chance
        seconds += costs.per_row
        if counts[text] < len(chances[text]):
            heappush(queue, (-chances[text][counts[text]], text))
    return counts
