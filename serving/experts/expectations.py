"""What compute is known to need."""

from collections import deque
from collections.abc import Iterable, Iterator

from .policies.policy import Key


class Expectations:
    """Experts that routers have chosen and compute has not used yet, in the order of need.

    ``key in expectations`` says that an expert is expected, and so protected. Those that
    have no slot yet are *announced*: they are read as soon as there is one.
    """

    def __init__(self) -> None:
        self._expected: dict[Key, None] = {}
        self._announced: deque[Key] = deque()

    def __contains__(self, key: object) -> bool:
        """Say whether compute is known to need an expert."""
        return key in self._expected

    @property
    def num_expected(self) -> int:
        """Experts that are protected."""
        return len(self._expected)

    @property
    def num_announced(self) -> int:
        """Experts that wait for a slot."""
        return len(self._announced)

    def expect(self, key: Key) -> None:
        """Protect an expert from now on."""
        self._expected[key] = None

    def announce(self, key: Key) -> None:
        """Let an expert wait for a slot, behind all others."""
        if key not in self._announced:
            self._announced.append(key)

    def announce_again(self, key: Key) -> None:
        """Let an expert that lost its slot wait for another, before all others."""
        self._announced.appendleft(key)

    def announced(self) -> list[Key]:
        """Return the experts that wait for a slot, the one that is needed first first."""
        return list(self._announced)

    def take_announced(self, key: Key) -> None:
        """Let an expert wait no longer: it has a slot."""
        self._announced.remove(key)

    def last_first(self) -> Iterator[Key]:
        """Yield the protected experts, the one that is needed last first."""
        return reversed(self._expected)

    def drop_layer(self, layer: int) -> None:
        """Forget what was chosen for a layer: its forward begins, and says what it needs."""
        self._expected = {key: None for key in self._expected if key[0] != layer}
        self._announced = deque(key for key in self._announced if key[0] != layer)

    def drop(self, keys: Iterable[Key]) -> None:
        """Protect these no longer: compute has used them."""
        for key in keys:
            self._expected.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self._announced.clear()
        self._expected.clear()
