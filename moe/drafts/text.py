"""The drafts of one text: what its drafter says, and how often that was right."""

from collections.abc import Sequence as Items

from .drafter import Draft, Drafter

MOST_IDS = 24
"""Of one draft."""
START = 0.5
"""The chance that an id is right, before any was seen."""
WEIGHT = 0.15
"""Of a new outcome in the average of those before."""
NOTHING = Draft(())


class TextDrafts:
    """A drafter that is watched: each guess is compared with the ids that came.

    Guesses are compared also while they do not run as rows of a step, which costs nothing. So it is
    noticed when a text begins to repeat.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._guess = NOTHING
        self._chances: dict[int, float] = {}
        """By bits of the match's length: the chance that the next id is right, if those before
        were."""
        self.num_read = 0
        """Ids of the text that the drafter knows."""
        self.ids: tuple[int, ...] = ()
        """Guessed ids that are further rows of the next step."""

    def read(self, ids: Items[int]) -> None:
        """The text went on with ``ids``: learn what the last guess was worth."""
        for place, (guessed, token) in enumerate(zip(self._guess.ids, ids, strict=False)):
            bits = (self._guess.match + place).bit_length()
            chance = self._chances.get(bits, START)
            self._chances[bits] = chance + WEIGHT * ((guessed == token) - chance)
            if guessed != token:
                break
        self._drafter.add(ids)
        self.num_read += len(ids)
        self._guess = NOTHING

    def guess(self, count: int) -> list[float]:
        """Guess up to ``count`` ids; return for each the chance that it and all before are right.

        Call once after :meth:`read`; :meth:`use` then says how many of them run.
        """
        self._guess = self._drafter.draft(min(count, MOST_IDS))
        chances, chance = [], 1.0
        for place in range(len(self._guess.ids)):
            bits = (self._guess.match + place).bit_length()
            chance *= self._chances.get(bits, START)
            chances.append(chance)
        return chances

    def use(self, count: int) -> None:
        """Make the first ``count`` guessed ids rows of the next step."""
        self.ids = self._guess.ids[:count]

    def drop(self) -> None:
        """Run none of them."""
        self.ids = ()
