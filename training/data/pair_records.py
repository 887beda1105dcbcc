"""Pairs of texts, from JSON and CSV files."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import DataError
from .documents import is_unicode
from .table_files import TableFiles


class TextPair(NamedTuple):
    """What is read, and what should be written."""

    source: str
    target: str


class PairFiles(TableFiles):
    """The pairs of a file, or of all JSON and CSV files below a folder."""

    def __init__(self, source: str, field: str, source_key: str, target_key: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        super().__init__(source, field, "pairs", (source_key, target_key))

    def __iter__(self) -> Iterator[TextPair]:
        for where, record in self.records():
            yield self._pair(record, where)

    def _pair(self, record: Any, where: str) -> TextPair:
        texts = []
        for option, key in zip(("source_key", "target_key"), self.keys, strict=True):
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
