"""What followed the last few ids when they came before: prompt lookup (Saxena 2023).

The prompt and the answer are one text, so what is copied from the prompt and what the answer says
again are both found.
"""

from collections.abc import Iterable

from .drafter import Draft, repeated

LENGTHS = (12, 6, 4, 3)
"""Ids of a match, the longest first. Shorter ones are right by chance alone in a text of bytes."""


class Ngrams:
    """The latest place of every n-gram of four lengths: four dictionary entries for each id."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._place_after: dict[tuple[int, ...], int] = {}
        """N-gram: the place in the text that followed it last."""

    def add(self, ids: Iterable[int]) -> None:
        """See :class:`.Drafter`."""
        text, place_after = self._ids, self._place_after
        for token in ids:
            # Only now the ids before have a follower. So the end of the text never finds itself.
            place = len(text)
            for length in LENGTHS:
                if length <= place:
                    place_after[tuple(text[place - length :])] = place
            text.append(token)

    def draft(self, count: int) -> Draft:
        """Follow the latest place of the longest n-gram that is known."""
        for length in LENGTHS:
            place = self._place_after.get(tuple(self._ids[-length:]))
            if place is not None:
                return Draft(repeated(self._ids, place, count), length)
        return Draft(())
