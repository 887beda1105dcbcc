"""What policies share that give every expert a number and evict the lowest one.

L MoE layers, E experts of a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Container
from typing import Any

import numpy as np
import numpy.typing as npt

from ..forwards import Forward
from .policy import CacheFacts, Key

Array = npt.NDArray[Any]


class ScoredPolicy(ABC):
    """Evicts the expert with the lowest score; of equal ones the least recently needed.

    Cost: a need is a few writes. A victim is some passes over an array ``[L, E]``, and one more for
    each protected expert that is found on the way and was not protected before.
    """

    def __init__(self, facts: CacheFacts) -> None:
        self._layers = facts.moe_layers
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        self._shape = (len(facts.moe_layers), facts.num_experts)
        self._here_LE = np.zeros(self._shape, dtype=bool)
        self._needed_LE = np.zeros(self._shape, dtype=np.int64)
        """When an expert was needed last, in needs; 0 = never."""
        self._num_needs = 0
        self._now = 0
        """Which of the layers computes, from 0 to L - 1."""
        self._passed_over: list[int] = []
        """Experts with low scores that were protected when a victim was last looked for."""

    @abstractmethod
    def scores(self) -> Array:
        """Return a finite number for each expert, ``[L, E]``; the lowest leaves first."""

    def begin(self, forward: Forward) -> None:
        """Start at the first layer."""
        self._now = 0

    def touch(self, key: Key, rows: int) -> None:
        """Note when ``key`` was needed."""
        self._now = self._place_of[key[0]]
        self._note(key)

    def expect(self, key: Key) -> None:
        """Note that ``key`` is as good as needed."""
        self._note(key)

    def add(self, key: Key) -> None:
        """Take ``key`` among those that may leave."""
        self._here_LE[self._place_of[key[0]], key[1]] = True
        self._note(key)

    def forget(self, key: Key) -> None:
        """Take ``key`` from those that may leave."""
        self._here_LE[self._place_of[key[0]], key[1]] = False

    def victim(self, protected: Container[Key]) -> Key | None:
        """Return the lowest one that is not protected."""
        scores = np.where(self._here_LE, self.scores(), np.inf).ravel()
        self._passed_over = [n for n in self._passed_over if self._key(n) in protected]
        scores[self._passed_over] = np.inf
        needed = self._needed_LE.ravel()
        while True:
            lowest = scores.min()
            if lowest == np.inf:
                return None
            equal = np.flatnonzero(scores == lowest)
            number = int(equal[needed[equal].argmin()])
            if self._key(number) not in protected:
                return self._key(number)
            self._passed_over.append(number)
            scores[number] = np.inf

    def _key(self, number: int) -> Key:
        place, expert = divmod(number, self._shape[1])
        return self._layers[place], expert

    def _note(self, key: Key) -> None:
        self._num_needs += 1
        self._needed_LE[self._place_of[key[0]], key[1]] = self._num_needs

    def _distances(self) -> Array:
        """Return how many layers lie between now and each layer's next turn, int ``[L, 1]``.

        0 is the layer that computes, L - 1 the one before it.
        """
        distances: Array = (np.arange(self._shape[0]) - self._now) % self._shape[0]
        return distances[:, None]
