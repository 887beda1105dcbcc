"""What came of drafted rows, in numbers."""

from dataclasses import dataclass
from typing import Protocol


class DraftTally(Protocol):
    """Hears of the drafted rows of each text in each step."""

    def add(self, drafted: int, accepted: int, cost_s: float, saved_s: float) -> None:
        """So many rows ran and so many of them were right.

        ``cost_s`` is the measured seconds of the rows, ``saved_s`` those that the accepted tokens
        would have taken without drafts.
        """
        ...


@dataclass(slots=True)
class DraftCounts:
    """A :class:`DraftTally` that sums up."""

    drafted: int = 0
    accepted: int = 0
    cost_s: float = 0.0
    saved_s: float = 0.0

    def add(self, drafted: int, accepted: int, cost_s: float, saved_s: float) -> None:
        """See :class:`DraftTally`."""
        self.drafted += drafted
        self.accepted += accepted
        self.cost_s += cost_s
        self.saved_s += saved_s
