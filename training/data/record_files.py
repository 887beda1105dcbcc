"""The JSON objects of a file, or of all JSON files below a folder."""

from collections.abc import Iterator
from typing import Any

from ...errors import DataError
from .documents import RECORD_SUFFIXES, Files, TextFile
from .presence import existing
from .records import NotJson, read_records


class RecordFiles:
    """JSON objects with the place where each stands."""

    def __init__(self, source: str, field: str, data_format: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        path = existing(source, field)
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in RECORD_SUFFIXES)
        if not found or not all(p.is_file() for p in found):
            raise DataError(
                f"{field} is {source!r}, but data.format is {data_format}; give a .jsonl, .ndjson "
                "or .json file, or a folder of these."
            )
        self._paths, self._source, self._field = found, source, field

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield where each object stands, and the object."""
        for path in self._paths:
            try:
                for where, record in read_records(
                    TextFile(path, self._source, self._field).blocks()
                ):
                    yield f"{path} {where}", record
            except NotJson as error:
                raise DataError(f"{path} {error.where} is not JSON; correct it.") from None

    def fingerprint(self) -> str | None:
        """Identify the files without reading them; None while one has just changed."""
        return Files(self._paths, self._source, "", self._field).fingerprint()
