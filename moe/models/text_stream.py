"""Token ids to text, piece by piece, with stop strings."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

REPLACEMENT = "\ufffd"
MAX_CHARACTER_IDS = 4
"""Ids that one UTF-8 character may take when every id is a byte."""
CONTEXT_IDS = 8
"""Prompt ids that the text is decoded with: the first piece may begin with a space or not."""


class TextStream:
    """The text of one answer as it grows.

    Text is held back while it might begin a stop string or ends inside a UTF-8 character, so
    released text never changes. ``context`` are the last ids of the prompt: some tokenizers drop
    the space of a text's first word.
    """

    def __init__(self, decode: Decode, stop: Sequence[str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, stop), default=1)
        self._ids = list(context)
        self._context_ids = 0
        """Where decoding starts."""
        self._done_ids = len(self._ids)
        """Ids whose text is in ``_text`` already."""
        self._text = ""
        self._sent = 0
        self.is_stopped = False
        """True when a stop string has been met; the text ends before it."""

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add a token and return the text that is certain now.

        While ``may_stop`` is False, stop strings are text like any other.
        """
        self._ids.append(token)
        self._take(self._num_certain(), may_stop)
        if not may_stop:
            return self._release(len(self._text))
        return self._release(len(self._text) - self._held_back())

    def finish(self) -> str:
        """Return what was held back."""
        if not self.is_stopped:
            self._take(len(self._ids) - self._done_ids)
        return self._release(len(self._text))

    def _num_certain(self) -> int:
        """Say how many of the new ids have text that later ids cannot change."""
        new = self._ids[self._done_ids :]
        whole = self._decode(new)
        if not whole.endswith(REPLACEMENT):
            return len(new)
        if len(new) < MAX_CHARACTER_IDS:
            return 0
        # What comes before a possible character of up to three ids is broken for good.
        for count in range(len(new) - MAX_CHARACTER_IDS + 1, len(new)):
            if self._decode(new[:count]) + self._decode(new[count:]) == whole:
                return count
        return len(new)

    def _take(self, count: int, may_stop: bool = True) -> None:
        """Move the text of the next ``count`` ids to ``_text``."""
        if count == 0:
            return
        end = self._done_ids + count
        before = self._decode(self._ids[self._context_ids : self._done_ids])
        self._text += self._decode(self._ids[self._context_ids : end])[len(before) :]
        self._context_ids, self._done_ids = self._done_ids, end
        if not may_stop:
            return
        found = [self._text.find(stop, self._sent) for stop in self._stop]
        cuts = [position for position in found if position >= 0]
        if cuts:
            self.is_stopped = True
            self._text = self._text[: min(cuts)]

    def _held_back(self) -> int:
        if self.is_stopped:
            return 0
        unsent = len(self._text) - self._sent
        for length in range(min(unsent, self._longest_stop - 1), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, end: int) -> str:
        piece, self._sent = self._text[self._sent : end], max(self._sent, end)
        return piece
