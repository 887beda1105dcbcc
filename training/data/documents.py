"""Where documents come from: read one at a time, repeatably, never the whole corpus in memory."""

import hashlib
import json
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ...errors import DataError
from .records import NotJson, read_records
from .text_files import read_blocks

TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PIECE = 1 << 18
"""Characters tokenised in one call; only longer documents are cut, after the end of a line."""
HUB = "hf:"
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""Files of JSON objects: one a line, or a list."""
SETTLED_S = 2
"""Seconds. A file changed more recently may change again within the same timestamp."""


class Document(Protocol):
    """A text in pieces; each iteration reads it again."""

    def __iter__(self) -> Iterator[str]: ...


class Source(Protocol):
    """A corpus; each iteration reads it again."""

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> str | None:
        """Identify the contents without reading them; None if that is impossible."""
        ...


class Text:
    """A document in memory."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __iter__(self) -> Iterator[str]:
        return cut_into_pieces([self._text])


class TextFile:
    """A text file as one document, which may be larger than memory."""

    def __init__(self, path: Path, source: str, field: str) -> None:
        self._path, self._source, self._field = path, source, field

    def __iter__(self) -> Iterator[str]:
        return cut_into_pieces(self.blocks())

    def blocks(self) -> Iterator[str]:
        """Read the file in blocks of characters."""
        return read_blocks(self._path, self._source, self._field)


class Files:
    """Text files (one document each) and JSON files (one document per object)."""

    def __init__(self, paths: list[Path], source: str, text_key: str, field: str) -> None:
        self._paths, self._source = paths, source
        self._text_key, self._field = text_key, field

    def __iter__(self) -> Iterator[Document]:
        for path in self._paths:
            if path.suffix.lower() in RECORD_SUFFIXES:
                yield from self._records(path)
            else:
                yield TextFile(path, self._source, self._field)

    def fingerprint(self) -> str | None:
        """Hash names, sizes and times of change; None while a file has just changed."""
        try:
            stats = [(str(path.resolve()), path.stat()) for path in self._paths]
        except OSError:
            return None
        if any(time.time() - stat.st_mtime < SETTLED_S for _, stat in stats):
            return None
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(json.dumps([self._text_key, facts]).encode()).hexdigest()

    def _records(self, path: Path) -> Iterator[Document]:
        blocks = TextFile(path, self._source, self._field).blocks()
        try:
            for where, record in read_records(blocks):
                text = record.get(self._text_key) if isinstance(record, dict) else None
                if not isinstance(text, str) or not is_unicode(text):
                    raise NotJson(where)
                yield Text(text)
        except NotJson as error:
            raise DataError(
                f"{path} {error.where} is not a JSON object with text under "
                f"{self._text_key!r}; correct it or set data.text_key."
            ) from None


class StandardLibrary:
    """The running Python's own modules, each one document."""

    def __iter__(self) -> Iterator[Document]:
        return (Text(text) for _, text in standard_library())

    def fingerprint(self) -> str | None:
        """Hash names, sizes and times of change."""
        return Files(_modules(), "stdlib", "", "data.source").fingerprint()


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the standard library's non-test modules, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _modules():
        try:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules are in other encodings on purpose


def cut_into_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Join blocks and cut them again, so that the pieces give the same tokens as the whole.

    A cut follows a single newline between two characters that are not white space. The word
    patterns of byte-level BPE tokenizers (GPT-2's and its descendants) always split there. A text
    without such a place is cut when a piece is full.
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > PIECE:
            cut = _line_end(rest, start)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def _line_end(text: str, start: int) -> int:
    end = start + PIECE
    place = text.rfind("\n", start + 1, end)
    while place > 0:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place + 1
        place = text.rfind("\n", start + 1, place)
    return end


def is_unicode(text: str) -> bool:
    """Say whether a text has no lone surrogates, which JSON can express."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _modules() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if TEST_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])
    )
