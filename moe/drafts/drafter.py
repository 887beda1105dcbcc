"""What a drafter is told, and what it says: how may a text go on?"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Draft(NamedTuple):
    """A guess of the next ids of a text."""

    ids: tuple[int, ...]
    """Likely next ids in order; empty if the drafter knows nothing."""
    match: int = 0
    """How many of the last ids led to the guess: a longer match is right more often."""


class Drafter(Protocol):
    """Guesses how one text goes on from the ids it has.

    A step computes the guessed ids with the rows of other requests and draws each token as it would
    without. So a drafter can only make an answer slower, never other. An object serves one text and
    is used by one thread. Its time is part of every step: no method may search the whole text.
    """

    def add(self, ids: Iterable[int]) -> None:
        """The text goes on with ``ids``: the prompt first, piece by piece, then each answer id."""
        ...

    def draft(self, count: int) -> Draft:
        """Return up to ``count`` ids that are likely to follow the text so far."""
        ...


def repeated(ids: list[int], place: int, count: int) -> tuple[int, ...]:
    """Return the ``count`` ids from ``place`` on, as if the end of the text went on from there.

    A text whose last ids repeat goes on repeating: ``a b a b`` from place 2 is ``a b a b a``...
    """
    found = ids[place : place + count]
    while len(found) < count:
        found += found[: count - len(found)]
    return tuple(found)
