"""What a policy is told, and what it is asked: which expert should leave its slot?"""

from collections.abc import Container
from typing import Protocol

Key = tuple[int, int]
"""(layer, expert)."""


class Policy(Protocol):
    """Chooses the expert to evict when a slot is needed and none is free.

    A policy sees keys only: no weights, no slots, no disk. So it can be replayed on any list of
    keys. The store itself protects the experts that a forward is about to need. So a policy decides
    among the others and can only make an answer slower, never wrong. An object serves one store.
    All calls come from one thread.
    """

    def add(self, key: Key) -> None:
        """``key`` has come into a slot."""
        ...

    def touch(self, key: Key) -> None:
        """Compute needs ``key`` now. It may be in a slot, on its way, or neither."""
        ...

    def expect(self, key: Key) -> None:
        """A router has chosen ``key``; compute will need it soon, and :meth:`touch` follows then.

        It may be in a slot, on its way, or neither.
        """
        ...

    def forget(self, key: Key) -> None:
        """``key`` has left its slot."""
        ...

    def victim(self, protected: Container[Key]) -> Key | None:
        """Return the key to put out: one that was added and is not in ``protected``.

        None if ``protected`` has them all. :meth:`forget` follows when it has been put out.
        """
        ...
