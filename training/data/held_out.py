"""Which text is held out: the end of a single document, or every n-th of many."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ...errors import DataError
from ..work import LongWork
from .documents import Document, Source

DIGEST_BYTES = 16
"""Of a held-out document, kept in memory: 100 million documents at 5 % take some 0.5 GB."""


@dataclass(frozen=True, slots=True)
class Split:
    """What one pass over a source has found."""

    num_documents: int
    every: int
    """Of many documents, those at 0, n, 2n, ... are held out."""
    cut: int
    """Of a single document, the characters from here on are held out."""
    digests: set[bytes] = field(repr=False)
    """Of the held-out documents: a copy of one must not be trained on."""

    def sides(self, source: Source) -> Iterator[tuple[bool, Document]]:
        """Yield (is held out, document) of what goes to either side, in the source's order."""
        for index, document in enumerate(source):
            if self.num_documents == 1:
                yield False, _Characters(document, 0, self.cut)
                yield True, _Characters(document, self.cut, None)
            elif index % self.every == 0:
                yield True, document
            elif digest_of(document) not in self.digests:
                yield False, document


def find_split(source: Source, name: str, fraction: float, work: LongWork) -> Split:
    """Read a source once. Raises :class:`DataError` when nothing would be left to train on."""
    every = every_nth(fraction)
    digests: set[bytes] = set()
    num_documents, num_characters, is_all_held_out = 0, 0, True
    for document in source:
        digest = digest_of(document)
        if num_documents == 0:
            num_characters = sum(map(len, document))
        if num_documents % every == 0:
            digests.add(digest)
        num_documents += 1
        is_all_held_out &= digest in digests
        work.advance(documents=num_documents)
    if num_documents == 0:
        raise DataError(f"data.source {name!r} holds no documents; give a corpus with some text.")
    if is_all_held_out and num_documents != 1:
        raise DataError(
            f"data.source {name!r} holds {num_documents} documents, all of them copies of held-out "
            "ones; give a corpus with other texts."
        )
    cut = num_characters - max(1, int(num_characters * fraction))
    return Split(num_documents, every, max(0, cut), digests)


def every_nth(fraction: float) -> int:
    """Return n such that holding out every n-th document holds out about ``fraction``."""
    return max(2, round(1 / fraction))


def digest_of(document: Iterable[str]) -> bytes:
    """Hash a document's text."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in document:
        digest.update(piece.encode())
    return digest.digest()


class _Characters:
    """A part of a document."""

    def __init__(self, document: Document, start: int, end: int | None) -> None:
        self._document, self._start, self._end = document, start, end

    def __iter__(self) -> Iterator[str]:
        place = 0
        for piece in self._document:
            end = len(piece) if self._end is None else max(0, self._end - place)
            if end == 0:
                return
            part = piece[max(0, self._start - place) : end]
            place += len(piece)
            if part:
                yield part
