"""Texts with labels, from JSON and CSV files."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import DataError
from .documents import RECORD_SUFFIXES, Files, TextFile, is_unicode
from .presence import existing
from .records import NotJson, read_records

SUFFIXES = (*RECORD_SUFFIXES, ".csv")


class LabelledText(NamedTuple):
    """A text and what it is."""

    text: str
    label: str


class LabelledFiles:
    """The texts of a file, or of all JSON and CSV files below a folder."""

    def __init__(self, source: str, field: str, text_key: str, label_key: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        path = existing(source, field)
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found or not all(p.is_file() and p.suffix.lower() in SUFFIXES for p in found):
            raise DataError(
                f"{field} is {source!r}, but data.format is classify; give a {', '.join(SUFFIXES)} "
                "file, or a folder of these."
            )
        self._paths, self._source, self._field = found, source, field
        self._keys = (text_key, label_key)

    def __iter__(self) -> Iterator[LabelledText]:
        for path in self._paths:
            for where, record in records_of(path, self._source, self._field):
                yield self._labelled(record, f"{path} {where}")

    def fingerprint(self) -> str | None:
        """Identify the files without reading them; None while one has just changed."""
        return Files(self._paths, self._source, "\0".join(self._keys), self._field).fingerprint()

    def _labelled(self, record: Any, where: str) -> LabelledText:
        text_key, label_key = self._keys
        for option, key in (("text_key", text_key), ("label_key", label_key)):
            if not isinstance(record, dict) or record.get(key) is None:
                raise DataError(
                    f"{where} has nothing under {key!r}; correct it or set data.{option}."
                )
        text, label = record[text_key], record[label_key]
        if not isinstance(text, str) or not text.strip() or not is_unicode(text):
            raise DataError(
                f"{where} has the text {str(text)[:40]!r}; give text that is not empty, or take it "
                "out."
            )
        if type(label) is int:
            label = str(label)
        if not isinstance(label, str) or not label.strip() or not is_unicode(label):
            raise DataError(
                f"{where} has the label {str(label)[:40]!r}; give a word or a whole number."
            )
        return LabelledText(text, label.strip())


def read_texts(path: Path, text_key: str) -> Iterator[str]:
    """Yield the texts of a file, which need no labels.

    A JSON or CSV file has them under ``text_key``; each line of any other file is one. Raises
    :class:`DataError`.
    """
    if path.suffix.lower() not in SUFFIXES:
        text = "".join(TextFile(path, str(path), "FILE").blocks())
        yield from (line for line in text.splitlines() if line.strip())
        return
    for where, record in records_of(path, str(path), "FILE"):
        found = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(found, str) or not found.strip() or not is_unicode(found):
            raise DataError(
                f"{path} {where} has no text under {text_key!r}; correct it, or name another key "
                "with --text-key."
            )
        yield found


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
