"""Records of JSON and CSV files, of which each has the values of some keys."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from .documents import RECORD_SUFFIXES, Files, TextFile
from .presence import existing
from .records import NotJson, read_records

SUFFIXES = (*RECORD_SUFFIXES, ".csv")


class TableFiles:
    """The records of a file, or of all JSON and CSV files below a folder."""

    def __init__(self, source: str, field: str, data_format: str, keys: Sequence[str]) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        path = existing(source, field)
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found or not all(p.is_file() and p.suffix.lower() in SUFFIXES for p in found):
            raise DataError(
                f"{field} is {source!r}, but data.format is {data_format}; give a "
                f"{', '.join(SUFFIXES)} file, or a folder of these."
            )
        self.keys = tuple(keys)
        self._paths, self._source, self._field = found, source, field

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield where each record stands, and what it says."""
        for path in self._paths:
            for where, record in records_of(path, self._source, self._field):
                yield f"{path} {where}", record

    def fingerprint(self) -> str | None:
        """Identify the files without reading them; None while one has just changed."""
        return Files(self._paths, self._source, "\0".join(self.keys), self._field).fingerprint()


def records_of(path: Path, source: str, field: str) -> Iterator[tuple[str, Any]]:
    """Yield where each record stands, and what it says."""
    if path.suffix.lower() == ".csv":
        yield from _rows(path)
        return
    try:
        yield from read_records(TextFile(path, source, field).blocks())
    except NotJson as error:
        raise DataError(f"{path} {error.where} is not JSON; correct it.") from None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table by its first line's names."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV table ({error}); correct it.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path} cannot be read ({reason}); correct it.") from None
