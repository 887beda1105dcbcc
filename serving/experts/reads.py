"""A read of an expert, and what runs reads."""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .policies.policy import Key

NO_THREAD = "the system allows no thread to read it"
"""Why a read ends that nothing can do."""


class Straight(NamedTuple):
    """How C++ reads an expert straight into a slot (reading/native/)."""

    plan: int
    """Address of a plan: where the bytes are, which parts of a slot they fill, and their hash."""
    addresses: int
    """Address of the addresses of the slot's parts."""
    num_chunks: int
    num_bytes: int
    took: Callable[[float], None] | None = None
    """Hears how many seconds the read took."""


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
    straight: Straight | None = None
    """How C++ does the whole read; None = ``parts`` do it."""
    begin: Callable[[], list[Callable[[], None]]] | None = None
    """Returns the parts, where they are made only if C++ fails."""
    ticket: int = -1
    """Number of the read in a queue of C++."""
    num_parts: int = 0
    """Parts at the start."""

    def __post_init__(self) -> None:
        self.num_parts = max(1, len(self.parts))

    def take(self, parts: list[Callable[[], None]]) -> None:
        """Let these parts do the read."""
        self.parts, self.num_parts = deque(parts), max(1, len(parts))

    @property
    def left(self) -> float:
        """The share that is still to be read, about."""
        return 1.0 if self.begin is not None else len(self.parts) / self.num_parts


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

    def look(self) -> None:
        """Mark the reads that are done, if that does not happen by itself."""
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
