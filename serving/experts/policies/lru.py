"""Least recently used first out."""

from collections import OrderedDict
from collections.abc import Container

from ..forwards import Forward
from .policy import CacheFacts, Key


class LeastRecentlyUsed:
    """Evicts the least recently needed expert. Being chosen counts as a need."""

    def __init__(self, facts: CacheFacts | None = None) -> None:
        self._by_age: OrderedDict[Key, None] = OrderedDict()
        """The experts in slots, the least recently used first."""

    def begin(self, forward: Forward) -> None:
        """Nothing: only the order of needs counts."""

    def add(self, key: Key) -> None:
        """Make ``key`` the youngest."""
        self._by_age[key] = None

    def touch(self, key: Key, rows: int = 1) -> None:
        """Make ``key`` the youngest, if it is in a slot."""
        if key in self._by_age:
            self._by_age.move_to_end(key)

    def expect(self, key: Key) -> None:
        """Make ``key`` the youngest, if it is in a slot."""
        self.touch(key)

    def forget(self, key: Key) -> None:
        """Drop ``key``."""
        del self._by_age[key]

    def victim(self, protected: Container[Key]) -> Key | None:
        """Return the oldest key that is not protected."""
        for key in self._by_age:
            if key not in protected:
                return key
        return None
