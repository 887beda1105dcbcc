"""Token ids to text, piece by piece, with stop strings."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one answer as it grows.

    A piece is held back while it might be the beginning of a stop string or ends inside a UTF-8
    character, so what has been handed out is never taken back.
    """

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._done_ids = 0
        """Ids whose text is in ``_text`` already."""
        self._context_ids = 0
        """Where decoding starts: some ids before, since pieces of a word depend on them."""
        self._text = ""
        self._sent = 0
        self.is_stopped = False
        """True when a stop string has been met; the text ends before it."""

    @property
    def text(self) -> str:
        """All text handed out so far."""
        return self._text[: self._sent]

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context_ids : self._done_ids])
        after = self._decode(self._ids[self._context_ids :])
        if after.endswith(REPLACEMENT) and len(self._ids) - self._done_ids < 4:
            return ""  # an unfinished character; after four bytes it is a wrong one
        self._append(after[len(before) :])
        self._context_ids, self._done_ids = self._done_ids, len(self._ids)
        return self._release(len(self._text) - self._held_back())

    def finish(self) -> str:
        """Return what was held back."""
        if not self.is_stopped and self._done_ids < len(self._ids):
            before = self._decode(self._ids[self._context_ids : self._done_ids])
            self._append(self._decode(self._ids[self._context_ids :])[len(before) :])
        return self._release(len(self._text))

    def _append(self, piece: str) -> None:
        self._text += piece
        found = [self._text.find(stop, self._sent) for stop in self._stop]
        cuts = [position for position in found if position >= 0]
        if cuts:
            self.is_stopped = True
            self._text = self._text[: min(cuts)]

    def _held_back(self) -> int:
        if self.is_stopped:
            return 0
        unsent = self._text[self._sent :]
        for length in range(min(len(unsent), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(unsent[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, end: int) -> str:
        piece, self._sent = self._text[self._sent : end], max(self._sent, end)
        return piece
