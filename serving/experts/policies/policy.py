"""What a policy is told, and what it is asked: which expert should leave its slot?"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from ..forwards import Forward

Key = tuple[int, int]
"""(layer, expert)."""


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a policy is built from."""

    moe_layers: tuple[int, ...]
    """Indices of the decoder layers with experts, in the order of a forward."""
    num_experts: int
    """Experts of a layer."""
    num_slots: int
    architecture: str
    """Of the model, as in the header of a route file."""


class Policy(Protocol):
    """Chooses the expert to evict when a slot is needed and none is free.

    A policy sees keys only: no weights, no slots, no disk. So it can be replayed on a recorded
    route file. The store itself protects the experts that a forward is about to need. So a policy
    decides among the others and can only make an answer slower, never wrong. An object serves one
    store. All calls come from one thread, in the same order for the same routes, unless experts are
    read ahead.
    """

    def begin(self, forward: Forward) -> None:
        """A forward begins; its layers follow in order."""
        ...

    def touch(self, key: Key, rows: int) -> None:
        """Compute needs ``key`` now, for ``rows`` rows of the forward.

        It may be in a slot, on its way, or neither.
        """
        ...

    def expect(self, key: Key) -> None:
        """A router has chosen ``key``; compute will need it soon, and :meth:`touch` follows then.

        It may be in a slot, on its way, or neither.
        """
        ...

    def add(self, key: Key) -> None:
        """``key`` gets a slot: its read begins."""
        ...

    def forget(self, key: Key) -> None:
        """``key`` has left its slot, or its read has failed."""
        ...

    def victim(self, protected: Container[Key]) -> Key | None:
        """Return the key to put out: one that was added and is not in ``protected``.

        None if ``protected`` has them all. :meth:`forget` follows when it has been put out.
        """
        ...
