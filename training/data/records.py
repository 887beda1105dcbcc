"""JSON values out of text: one a line (JSON Lines), or the members of one list."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

BLANK = re.compile(r"[ \t\r\n]*")
LONGEST = 1 << 28
"""Characters of a list's member at most: what is no JSON must not fill the memory."""


class NotJson(ValueError):  # noqa: N818 - the caller words it
    """Text that is not the JSON that was hoped for; ``where`` says which line or member."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


def read_records(blocks: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) of a JSON list's members or of JSON lines; text tells which it is.

    Neither is held in memory as a whole. Raises :class:`NotJson`.
    """
    start = ""
    for block in blocks:
        start += block
        if start.strip():
            break
    whole = chain([start], blocks)
    if start.lstrip().startswith("["):
        yield from _members_of(_ListText(whole))
        return
    for number, line in enumerate(_lines_of(whole), start=1):
        if line.strip():
            yield f"line {number}", _parse(line, f"line {number}")


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise NotJson(where) from None


def _lines_of(blocks: Iterable[str]) -> Iterator[str]:
    rest: list[str] = []
    for block in blocks:
        *whole, last = block.split("\n")
        for line in whole:
            yield "".join([*rest, line])
            rest = []
        rest.append(last)
    if rest:
        yield "".join(rest)


def _members_of(text: "_ListText") -> Iterator[tuple[str, Any]]:
    number, where = 0, "object 1"
    text.take("[")
    while text.next_sign() != "]":
        number += 1
        where = f"object {number}"
        if number > 1 and not text.take(","):
            raise NotJson(where)
        text.next_sign()
        yield where, text.value(where)
    text.take("]")
    if text.next_sign():
        raise NotJson(f"what follows {where}")


class _ListText:
    """The text of a JSON list, of which no more than a member and a block are in memory."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks = blocks
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0

    def next_sign(self) -> str:
        """Go on to the next character that is not blank and return it, '' at the end."""
        while True:
            blank = BLANK.match(self._text, self._at)
            assert blank is not None, "blanks may be none"
            self._at = blank.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(1):
                return ""

    def take(self, sign: str) -> bool:
        """Go on behind ``sign`` if it comes next, or say that it does not."""
        if self.next_sign() != sign:
            return False
        self._at += 1
        return True

    def value(self, where: str) -> Any:
        """Take the value that begins here."""
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):  # perhaps it goes on in the next block
                unread = len(self._text) - self._at
                if unread > LONGEST or not self._read(unread):
                    raise NotJson(where) from None
            else:
                return value

    def _read(self, at_least: int) -> bool:
        """Read so many characters if they are there; at once as many as there are unread, so that
        a long value is not parsed from its beginning for each block."""
        parts = [self._text[self._at :]]
        count = 0
        for block in self._blocks:
            parts.append(block)
            count += len(block)
            if count >= at_least:
                break
        self._text, self._at = "".join(parts), 0
        return count > 0
