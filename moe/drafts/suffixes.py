"""What followed the longest end of the text that came before, whatever its length.

A suffix automaton of the text, built id by id (Blumer et al. 1985): a state stands for all strings
that end at the same places, and its link for the longest end of them that has further places. So
the link of the newest state is the longest end of the text that came before.
"""

from collections.abc import Iterable

from .drafter import Draft, repeated

SHORTEST = 3
"""Ids of the shortest match that counts; shorter ones are right by chance alone."""
NO_STATE = -1


class Suffixes:
    """At most two states for each id, in amortized constant time; about 600 bytes for each id."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._lengths = [0]
        """Of the longest string of each state."""
        self._links = [NO_STATE]
        self._next: list[dict[int, int]] = [{}]
        """The state after a further id."""
        self._places = [0]
        """Where the text went on after the state's strings: the first time, or the last time that
        they were the longest match."""
        self._last = 0
        """The state of the whole text."""
        self._match, self._place = 0, 0

    def add(self, ids: Iterable[int]) -> None:
        """See :class:`.Drafter`."""
        for token in ids:
            self._extend(token)
            link = self._links[self._last]
            self._match, self._place = self._lengths[link], self._places[link]
            self._places[link] = len(self._ids)

    def draft(self, count: int) -> Draft:
        """Follow the longest match."""
        if self._match < SHORTEST:
            return Draft(())
        return Draft(repeated(self._ids, self._place, count), self._match)

    def _extend(self, token: int) -> None:
        """Add one id, and the state of the text that it ends."""
        self._ids.append(token)
        new = self._new_state(len(self._ids), {}, 0, len(self._ids))
        state, self._last = self._last, new
        while state != NO_STATE and token not in self._next[state]:
            self._next[state][token] = new
            state = self._links[state]
        if state == NO_STATE:
            return
        target = self._next[state][token]
        if self._lengths[target] == self._lengths[state] + 1:
            self._links[new] = target
            return
        # Only a part of the target's strings ends here, too: that part gets a state.
        part = self._new_state(
            self._lengths[state] + 1,
            self._next[target].copy(),
            self._links[target],
            self._places[target],
        )
        self._links[target] = self._links[new] = part
        while state != NO_STATE and self._next[state].get(token) == target:
            self._next[state][token] = part
            state = self._links[state]

    def _new_state(self, length: int, following: dict[int, int], link: int, place: int) -> int:
        self._lengths.append(length)
        self._next.append(following)
        self._links.append(link)
        self._places.append(place)
        return len(self._lengths) - 1
