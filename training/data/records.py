"""JSON values from text: one a line (JSON Lines), or the members of one list."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

BLANK = re.compile(r"[ \t\r\n]*")
LONGEST = 1 << 28
"""Most characters of a list's member, so that text that is not JSON cannot fill the memory."""


class NotJson(ValueError):  # noqa: N818 - the caller words it
    """Text that is not the expected JSON; ``where`` says which line or member."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


def read_records(blocks: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) for the members of a JSON list, or for JSON lines.

    A text that begins with ``[`` is a list. Neither is held in memory as a whole. Raises
    :class:`NotJson`.
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
    """The text of a JSON list; only one member and one block are in memory."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks = blocks
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0

    def next_sign(self) -> str:
        """Skip blanks and return the next character without taking it; '' at the end."""
        while True:
            blank = BLANK.match(self._text, self._at)
            assert blank is not None, "blanks may be none"
            self._at = blank.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(1):
                return ""

    def take(self, sign: str) -> bool:
        """Skip ``sign`` if it comes next; say whether it did."""
        if self.next_sign() != sign:
            return False
        self._at += 1
        return True

    def value(self, where: str) -> Any:
        """Take the value that begins here."""
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):  # it may continue in the next block
                unread = len(self._text) - self._at
                if unread > LONGEST or not self._read(unread):
                    raise NotJson(where) from None
            else:
                return value

    def _read(self, at_least: int) -> bool:
        """Read at least so many characters if the text has them; say whether any came.

        Callers double the unread text each time, so that a long value is not parsed again for
        every block.
        """
        parts = [self._text[self._at :]]
        count = 0
        for block in self._blocks:
            parts.append(block)
            count += len(block)
            if count >= at_least:
                break
        self._text, self._at = "".join(parts), 0
        return count > 0
