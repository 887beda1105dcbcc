"""Pairs of texts, from JSON and CSV files."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import DataError
from .documents import Files, is_unicode
from .labelled_records import SUFFIXES, records_of
from .presence import existing


class TextPair(NamedTuple):
    """What is read, and what should be written."""

    source: str
    target: str


class PairFiles:
    """The pairs of a file, or of all JSON and CSV files below a folder."""

    def __init__(self, source: str, field: str, source_key: str, target_key: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        path = existing(source, field)
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found or not all(p.is_file() and p.suffix.lower() in SUFFIXES for p in found):
            raise DataError(
                f"{field} is {source!r}, but data.format is pairs; give a {', '.join(SUFFIXES)} "
                "file, or a folder of these."
            )
        self._paths, self._source, self._field = found, source, field
        self._keys = (source_key, target_key)

    def __iter__(self) -> Iterator[TextPair]:
        for path in self._paths:
            for where, record in records_of(path, self._source, self._field):
                yield self._pair(record, f"{path} {where}")

    def fingerprint(self) -> str | None:
        """Identify the files without reading them; None while one has just changed."""
        return Files(self._paths, self._source, "\0".join(self._keys), self._field).fingerprint()

    def _pair(self, record: Any, where: str) -> TextPair:
        texts = []
        for option, key in zip(("source_key", "target_key"), self._keys, strict=True):
            text = record.get(key) if isinstance(record, dict) else None
            if text is None:
                raise DataError(
                    f"{where} has nothing under {key!r}; correct it or set data.{option}."
                )
            if not isinstance(text, str) or not text.strip() or not is_unicode(text):
                raise DataError(
                    f"{where} has {str(text)[:40]!r} under {key!r}; give text that is not empty, "
                    "or take the pair out."
                )
            texts.append(text)
        return TextPair(*texts)
