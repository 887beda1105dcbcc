"""Which text is held out: every n-th document, or the ends of documents if those miss the share."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ...errors import DataError
from ..work import LongWork
from .documents import Document, Source

DIGEST_BYTES = 16
"""Bytes kept in memory per held-out document: 100 million documents at 5 % take about 0.5 GB."""
TOLERANCE = 1 / 3
"""Whole documents are held out if their share is within this relative distance of the requested
one. Every 20th module of the standard library is 17 % short."""
LONG = 1 / 4
"""Otherwise documents longer than this part of the held-out total are cut and give their ends: one
whole document more or less would miss the share."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The last ``part`` of documents of at least ``length`` characters is held out."""

    length: float
    part: float

    def cut(self, length: int) -> int | None:
        """Return where a document's held-out end begins; None if it is not cut."""
        return None if length < self.length else length - int(length * self.part)


@dataclass(frozen=True, slots=True)
class Split:
    """How to split a source, found in one pass over it."""

    num_documents: int
    every: int
    """Documents 0, n, 2n, ... are held out, among those that are not cut."""
    ends: Ends | None
    """None if no document is cut."""
    digests: set[bytes] = field(repr=False)
    """Hashes of held-out documents, whose copies must not be trained on. Copies of a cut document
    are cut at the same place."""

    def sides(self, source: Source) -> Iterator[tuple[bool, Document]]:
        """Yield (is held out, document) for all text that is used, in the source's order."""
        for index, document in enumerate(source):
            digest, length = _measure(document)
            cut = None if self.ends is None else self.ends.cut(length)
            if cut is not None:
                if cut > 0:
                    yield False, _Characters(document, 0, cut)
                if cut < length:
                    yield True, _Characters(document, cut, None)
            elif index % self.every == 0:
                yield True, document
            elif digest not in self.digests:
                yield False, document


def find_split(source: Source, name: str, fraction: float, work: LongWork) -> Split:
    """Read a source once and decide what to hold out: about ``fraction`` of its characters.

    Raises :class:`DataError` if nothing would be left to train on.
    """
    every = every_nth(fraction)
    digests: set[bytes] = set()
    lengths = _Lengths()
    is_all_held_out = True
    for document in source:
        digest, length = _measure(document)
        is_nth = lengths.num_documents % every == 0
        lengths.add(length, is_nth)
        if is_nth:
            digests.add(digest)
        is_all_held_out &= digest in digests
        work.advance(documents=lengths.num_documents)
    if lengths.num_documents == 0:
        raise DataError(f"data.source {name!r} holds no documents; give a corpus with some text.")
    ends = _choose_ends(lengths, fraction)
    if is_all_held_out and ends is None:
        raise DataError(
            f"data.source {name!r} holds {lengths.num_documents} documents, all of them copies of "
            "held-out ones; give a corpus with other texts."
        )
    return Split(lengths.num_documents, every, ends, digests)


class _Lengths:
    """How often each length occurs. This stays small: texts of a million different lengths have at
    least 500 G characters."""

    def __init__(self) -> None:
        self.num_documents = 0
        self._all: Counter[int] = Counter()
        self._nth: Counter[int] = Counter()

    def add(self, length: int, is_nth: bool) -> None:
        """Count a document; ``is_nth`` ones are held out if they are not cut."""
        self.num_documents += 1
        self._all[length] += 1
        self._nth[length] += is_nth

    def total(self, at_least: float = 0) -> int:
        """Return the characters of documents of at least some length."""
        return sum(size * count for size, count in self._all.items() if size >= at_least)

    def nth(self, below: float) -> int:
        """Return the characters of n-th documents below some length."""
        return sum(size * count for size, count in self._nth.items() if size < below)

    def held_out(self, ends: Ends | None) -> int:
        """Return the characters that are held out."""
        if ends is None:
            return self.nth(math.inf)
        cuts = ((size, count, ends.cut(size)) for size, count in self._all.items())
        held_out = sum((size - cut) * count for size, count, cut in cuts if cut is not None)
        return held_out + self.nth(ends.length)


def _choose_ends(lengths: _Lengths, fraction: float) -> Ends | None:
    """Return what to cut so that ``fraction`` is held out; None if whole documents are enough."""
    total = lengths.total()
    wanted = fraction * total
    long = LONG * wanted
    long_total = lengths.total(long)
    choices: list[Ends | None] = []
    if lengths.num_documents > 1:
        choices.append(None)
    if 0 < long_total < total:  # long documents supply what the short ones lack
        part = (wanted - lengths.nth(long)) / long_total
        choices.append(Ends(long, min(0.5, max(fraction / 2, part))))
    choices.append(Ends(0, fraction))

    def miss(ends: Ends | None) -> float:
        return abs(lengths.held_out(ends) - wanted)

    good = (ends for ends in choices if miss(ends) <= TOLERANCE * wanted)
    return next(good, min(choices, key=miss))


def every_nth(fraction: float) -> int:
    """Return n such that holding out every n-th document holds out about ``fraction``."""
    return max(2, round(1 / fraction))


def digest_of(document: Iterable[str]) -> bytes:
    """Hash a document's text."""
    return _measure(document)[0]


def _measure(document: Iterable[str]) -> tuple[bytes, int]:
    """Return the hash and the number of characters of a document's text."""
    digest, length = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    for piece in document:
        digest.update(piece.encode())
        length += len(piece)
    return digest.digest(), length


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
