"""Texts with labels, from JSON and CSV files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import DataError
from .documents import TextFile, is_unicode
from .table_files import SUFFIXES, TableFiles, records_of


class LabelledText(NamedTuple):
    """A text and what it is."""

    text: str
    label: str


class LabelledFiles(TableFiles):
    """The texts of a file, or of all JSON and CSV files below a folder."""

    def __init__(self, source: str, field: str, text_key: str, label_key: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        super().__init__(source, field, "classify", (text_key, label_key))

    def __iter__(self) -> Iterator[LabelledText]:
        for where, record in self.records():
            yield self._labelled(record, where)

    def _labelled(self, record: Any, where: str) -> LabelledText:
        text_key, label_key = self.keys
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
