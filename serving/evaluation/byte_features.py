"""Simple facts about each byte of a text, which units of a model may stand for.

N bytes.
"""

import string
from collections.abc import Callable

import torch
from torch import Tensor

LETTERS = frozenset(string.ascii_letters.encode())
QUOTE, NEWLINE = ord('"'), ord("\n")
COMMON_WORDS = ("the", "and", "to", "of", "you")


def byte_features(text: bytes) -> dict[str, Tensor]:
    """Return whether each fact is true at each byte, bool ``[N]`` by its name.

    A fact is known from the byte and those before it, as a causal model reads them; nothing comes
    from a language or a model. Columns and lines begin at 0.
    """
    found = {name: _of_class(text, members) for name, members in CLASSES.items()}
    places: list[_Place] = []
    for at in range(len(text)):
        places.append(_Place(text, at, places[-1] if places else None))
    for name, is_true in PLACES.items():
        found[name] = torch.tensor([is_true(place) for place in places], dtype=torch.bool)
    return found


class _Place:
    """A byte, and what the text up to it says."""

    def __init__(self, text: bytes, at: int, before: "_Place | None") -> None:
        self.byte = text[at]
        self._text, self._end = text, at + 1
        is_first = before is None or before.byte == NEWLINE
        self.column: int = 0 if before is None or is_first else before.column + 1
        """Bytes of the line before this one."""
        self.letters: int = 0
        """Letters of the word so far, this one included; 0 outside words."""
        if self.byte in LETTERS:
            self.letters = 1 if before is None else before.letters + 1
        was_quoted, was_bracketed = (
            (False, False) if before is None else (before.in_quotes, before.in_brackets)
        )
        self.in_quotes: bool = was_quoted != (self.byte == QUOTE)
        self.in_brackets: bool = self.byte in b"([" or (was_bracketed and self.byte not in b")]")
        self.is_new_paragraph: bool = before is None or (
            before.column == 0 if is_first else before.is_new_paragraph
        )
        """Whether the line before is empty."""

    @property
    def word(self) -> bytes:
        """The letters of the word so far."""
        return self._text[self._end - self.letters : self._end]

    def ends_with(self, ending: bytes) -> bool:
        """Say whether the text so far ends so."""
        return self._text[max(0, self._end - len(ending)) : self._end] == ending

    @property
    def begins_a_sentence(self) -> bool:
        """Whether this is the first letter after a full stop, or a mark like it, and spaces."""
        before = self._text[max(0, self._end - 5) : self._end - 1].rstrip()
        return self.letters == 1 and before[-1:] in (b".", b"!", b"?")


def _is_word(word: str) -> Callable[[_Place], bool]:
    return lambda place: place.word.lower() == word.encode()


def _of_class(text: bytes, members: bytes) -> Tensor:
    table = torch.zeros(256, dtype=torch.bool)
    table[list(members)] = True
    return table[torch.tensor(list(text), dtype=torch.long)]


CLASSES: dict[str, bytes] = {
    "upper-case letter": string.ascii_uppercase.encode(),
    "vowel": b"aeiouAEIOU",
    "digit": string.digits.encode(),
    "space": b" ",
    "newline": b"\n",
    "comma or semicolon": b",;",
    "end of a sentence": b".!?",
    "apostrophe": b"'",
}
"""Facts about the byte alone."""

PLACES: dict[str, Callable[[_Place], bool]] = {
    "first letter of a word": lambda p: p.letters == 1,
    "second letter of a word": lambda p: p.letters == 2,
    "third letter of a word": lambda p: p.letters == 3,
    "fourth letter of a word": lambda p: p.letters == 4,
    "seventh letter of a word or later": lambda p: p.letters >= 7,
    "first letter of a sentence": lambda p: p.begins_a_sentence,
    "two capitals in a row": lambda p: p.word[-2:].isupper() and p.letters >= 2,
    "the same letter twice": lambda p: p.letters >= 2 and p.word[-1] == p.word[-2],
    "first of a line": lambda p: p.column == 0,
    "columns 1 to 9 of a line": lambda p: 1 <= p.column <= 9,
    "column 40 of a line or later": lambda p: p.column >= 40,
    "first line of a paragraph": lambda p: p.is_new_paragraph,
    "empty line": lambda p: p.column == 0 and p.byte == NEWLINE,
    "in quotes": lambda p: p.in_quotes,
    "in brackets": lambda p: p.in_brackets,
    "after a comma and a space": lambda p: p.ends_with(b", "),
    "ends in th": lambda p: p.ends_with(b"th"),
    "ends in ing": lambda p: p.ends_with(b"ing"),
    **{f"the word so far is {word}": _is_word(word) for word in COMMON_WORDS},
}
"""Facts about a byte and the text before it."""
