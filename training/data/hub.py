"""Data sets of the Hugging Face hub, or local folders in their formats, read in order; resumable.

The datasets library has run no code of data sets since version 4, and this file never asks for it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..formats.text import TextsConfig
from .documents import HUB, Document, Text

PAUSES_S = (1, 2, 4, 8, 16)
"""Seconds between attempts after a failure; the library itself already retries connections."""
READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Reader of a single file by its lower-case suffix, ignoring ``.gz``."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two documents of a split, in JSON types."""

    state: dict[str, Any] | None = None
    """The datasets library's state at this place; None at the beginning."""
    documents: int = 0
    """Rows before this place."""


class HubSource:
    """A split of a data set. The constructor opens it and refuses one that cannot be used."""

    def __init__(self, config: TextsConfig, source: str, split: str, field: str) -> None:
        self._name = source.removeprefix(HUB)
        self._config, self._revision = config.hf_config, config.hf_revision
        self._text_key, self._split = config.text_key, split
        self._field, self._source = field, source
        self.open()

    def __str__(self) -> str:
        return f"{self._field} {self._source!r}"

    def __iter__(self) -> Iterator[Document]:
        reader = HubReader(self, Position(), time.sleep)
        try:
            while (text := reader.next_text()) is not None:
                yield Text(text)
        finally:
            reader.close()

    def fingerprint(self) -> str | None:
        """Hash the name and revision, which stand for the contents: reading costs too much."""
        facts = [self._name, self._config, self._revision, self._split, self._text_key]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def open(self) -> Any:
        """Return the split as an ``IterableDataset`` of the text alone, from the beginning."""
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{self._field} is {self._source!r}, which needs the datasets library; "
                "pip install 'moeyard[datasets]'."
            ) from None
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # reported once, here
        path, files = self._name, None
        if Path(path).is_file():
            suffix = Path(path.lower().removesuffix(".gz")).suffix
            path, files = READERS.get(suffix, path), path
        try:
            splits = datasets.load_dataset(
                path, self._config, data_files=files, revision=self._revision, streaming=True
            )
            known = sorted(splits)
            rows = splits.get(self._split)
            columns = None if rows is None else rows.column_names
        except Exception as error:  # the library raises errors of any type
            raise DataError(
                f"{self._field} is {self._source!r}, which cannot be opened "
                f"({_reason(error)}); give hf: and a data set's name or folder."
            ) from error
        if rows is None:
            raise DataError(
                f"split {self._split!r} is not in {self._source!r}, which has "
                f"{', '.join(known)}; choose one of these."
            )
        if columns is None:  # some formats name columns only row by row
            return rows
        if self._text_key not in columns:
            raise self._no_text(columns)
        return rows.select_columns([self._text_key])

    def text_of(self, row: dict[str, Any], number: int) -> str | None:
        """Return a row's text, None for a row without one."""
        if self._text_key not in row:
            raise self._no_text(list(row))
        text = row[self._text_key]
        if text is None:
            return None
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise DataError(
                f"row {number} of {self._source!r} has no text under {self._text_key!r} but a "
                f"{type(text).__name__} or broken characters; set data.text_key to a column of "
                "text."
            ) from None
        return text

    def broken_off(self, documents: int, error: Exception) -> DataError:
        """Say that reading failed for good."""
        return DataError(
            f"{self._source!r} broke off after {documents} documents ({_reason(error)}) and "
            f"{len(PAUSES_S)} more attempts failed; repair it or the network and start again: a "
            "training run continues from there."
        )

    def _no_text(self, columns: list[str]) -> DataError:
        return DataError(
            f"data.text_key is {self._text_key!r}, but {self._source!r} has the columns "
            f"{', '.join(columns)}; choose the one with the text."
        )


class HubReader:
    """Reads texts from a position onwards and retries after temporary failures."""

    def __init__(
        self, source: HubSource, start: Position, pause: Callable[[float], object]
    ) -> None:
        self.position = start
        """The place after the last text returned."""
        self._source, self._pause = source, pause
        self._failure: DataError | None = None
        self._reopen()

    def next_text(self) -> str | None:
        """Return the next text; None at the end of the split. Rows without text are skipped."""
        while True:
            row = self._next_row()
            if row is None:
                return None
            text = self._source.text_of(row, self.position.documents)
            if text is not None:
                return text

    def close(self) -> None:
        """Close open files."""
        self._rows.close()

    def _next_row(self) -> dict[str, Any] | None:
        if self._failure is not None:
            raise self._failure
        failure: Exception | None = None
        for pause_s in (*PAUSES_S, None):
            try:
                if failure is not None:
                    self._reopen()
                row: dict[str, Any] | None = next(self._rows, None)
            except Exception as error:  # networks, files and decoders all fail in their own ways
                failure = error
                if pause_s is not None:
                    self._pause(pause_s)
                continue
            if row is not None:
                seen = self.position.documents + 1
                self.position = Position(self._dataset.state_dict(), seen)
            return row
        assert failure is not None, "no attempt was made"
        self._failure = self._source.broken_off(self.position.documents, failure)
        raise self._failure from failure

    def _reopen(self) -> None:
        self._dataset = self._source.open()
        if self.position.state is not None:
            self._dataset.load_state_dict(self.position.state)
        self._rows = iter(self._dataset)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
