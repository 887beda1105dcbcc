"""A read of an expert, and what runs reads."""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from .policies.policy import Key


@dataclass(slots=True, eq=False)
class Read:
    """One expert on its way into a slot."""

    key: Key
    slot: int
    is_urgent: bool
    parts: deque[Callable[[], None]]
    """What is still to be done, in this order."""
    is_prefetch: bool = False
    """True when it began early, urgent as it may have become."""
    is_dropped: bool = False
    """True when it is no longer wanted and ends, with an error, before its next part."""
    is_done: bool = False
    error: BaseException | None = None
    num_parts: int = 0
    """Parts at the start."""

    def __post_init__(self) -> None:
        self.num_parts = max(1, len(self.parts))


class DroppedError(Exception):
    """Ends a read that is no longer wanted."""


class Reads(Protocol):
    """What runs reads: threads, or a replay's clock."""

    def submit(self, read: Read) -> None:
        """Start a read as soon as possible."""
        ...

    def make_urgent(self, read: Read) -> bool:
        """Move an early read to the urgent ones; False if it was dropped and has ended."""
        ...

    def drop(self, read: Read) -> None:
        """Let a read that has begun end early, if it can; it may finish all the same."""
        ...

    def progress(self) -> tuple[float, float]:
        """Return how many reads were done so far, and in how many seconds of reading."""
        ...

    def cancel(self, read: Read) -> bool:
        """Take back a read that has not begun; say whether that was so."""
        ...

    def wait_for_any(self, reads: Collection[Read]) -> list[Read]:
        """Return those of ``reads`` that are done, once there is one."""
        ...

    def wait_for_all(self, reads: Collection[Read]) -> None:
        """Return when all of ``reads`` are done."""
        ...

    def close(self) -> None:
        """Stop. Reads that have not begun fail."""
        ...
