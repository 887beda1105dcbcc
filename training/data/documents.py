"""Where documents come from: read one at a time, as often as asked, never a corpus in memory."""

import hashlib
import json
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ...errors import DataError
from ..config import DataConfig

TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PIECE = 1 << 18
"""Characters tokenised in one go; only longer documents are cut, behind a line's end."""
HUB = "hf:"
SETTLED_S = 2
"""A file changed more recently may change again without its time of change showing it."""


class Document(Protocol):
    """A text in pieces, to be read as often as asked."""

    def __iter__(self) -> Iterator[str]: ...


class Source(Protocol):
    """A corpus; each iteration reads it anew."""

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> str | None:
        """Identify the contents without reading them; None where that cannot be done."""
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
        try:
            with self._path.open(encoding="utf-8") as file:
                while block := file.read(PIECE):
                    yield block
        except OSError as error:
            raise DataError(
                f"{self._field} is {self._source!r}, which cannot be read ({error.strerror}); "
                "give 'stdlib', a text file, a .jsonl file, a folder of these, a .bin shard or "
                "hf:NAME."
            ) from None
        except UnicodeDecodeError:
            raise DataError(
                f"{self._field} {str(self._path)!r} is not UTF-8 text; convert it first."
            ) from None


class Files:
    """Text files, each one document, and JSONL files, a document a line."""

    def __init__(self, paths: list[Path], source: str, text_key: str, field: str) -> None:
        self._paths, self._source = paths, source
        self._text_key, self._field = text_key, field

    def __iter__(self) -> Iterator[Document]:
        for path in self._paths:
            if path.suffix == ".jsonl":
                yield from self._lines(path)
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

    def _lines(self, path: Path) -> Iterator[Document]:
        blocks = TextFile(path, self._source, self._field).blocks()
        for number, line in enumerate(_lines_of(blocks), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self._text_key]
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(
                    f"{path} line {number} is not a JSON object with text under "
                    f"{self._text_key!r}; mend the line or set data.text_key."
                ) from None
            yield Text(text)


class StandardLibrary:
    """The running Python's own modules, each one document."""

    def __iter__(self) -> Iterator[Document]:
        return (Text(text) for _, text in standard_library())

    def fingerprint(self) -> str | None:
        """Hash names, sizes and times of change."""
        return Files(_modules(), "stdlib", "", "data.source").fingerprint()


def open_source(config: DataConfig, source: str, split: str, field: str) -> Source:
    """Open a source of the kinds that ``data.source`` takes, except shards.

    ``field`` is the configuration key that messages name, ``split`` that of a data set.
    """
    if source == "stdlib":
        return StandardLibrary()
    if source.startswith(HUB):
        from .hub import HubSource

        return HubSource(config, source, split, field)
    path = Path(source)
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
        if not paths:
            raise DataError(
                f"{field} is the folder {source!r}, which holds no .txt or .jsonl file; "
                "give one that does."
            )
    elif not path.is_file():
        next(iter(TextFile(path, source, field)), "")  # says why it cannot be read
    return Files(paths, source, config.text_key, field)


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the standard library's non-test modules, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _modules():
        try:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules are in other encodings on purpose


def cut_into_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Join blocks and cut them again so that tokenising the pieces is tokenising the whole.

    A cut comes behind a single line's end between two characters that are no white space: the
    patterns that byte-level BPE tokenizers split words with (GPT-2's and its descendants) always
    split there. A text without such a place is cut where a piece is full.
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


def _modules() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if TEST_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])
    )
