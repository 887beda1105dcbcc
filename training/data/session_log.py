"""Logs of what users watched, from CSV and parquet files.

E events.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import DataError

COLUMNS = ("user", "session", "item", "watch_s", "liked")
YES, NO = ("1", "1.0", "true", "True"), ("0", "0.0", "false", "False", "")


class SessionLog(NamedTuple):
    """The events of a log, in its order; users and sessions are numbered as they come."""

    users_E: npt.NDArray[np.int64]
    sessions_E: npt.NDArray[np.int64]
    """No two users share a session."""
    items_E: npt.NDArray[np.int64]
    """Places of items in the table."""
    watch_s_E: npt.NDArray[np.float64]
    """Seconds that the user watched the item."""
    liked_E: npt.NDArray[np.bool_]


def read_log(
    path: Path,
    field: str,
    number: Mapping[str, int],
    advance: Callable[[], object] = lambda: None,
) -> SessionLog:
    """Read a log whose events are in order of time; ``number`` has the place of each item.

    ``field`` is the configuration key that names the log; ``advance`` is called for each event.
    Raises :class:`DataError` for an item without a place, and for text where numbers should be.
    """
    users: dict[str, int] = {}
    sessions: dict[tuple[int, str], int] = {}
    found: list[tuple[int, int, int, float, bool]] = []
    for where, row in rows_of(path, field, COLUMNS):
        advance()
        user = users.setdefault(name_of(row, "user", where), len(users))
        session = sessions.setdefault((user, name_of(row, "session", where)), len(sessions))
        item = item_number(name_of(row, "item", where), where, number)
        found.append((user, session, item, _seconds(row, where), _liked(row, where)))
    if not found:
        raise DataError(f"{field} is {str(path)!r}, which has no events; give a log with some.")
    user_E, session_E, item_E, watch_E, liked_E = zip(*found, strict=True)
    return SessionLog(
        users_E=np.array(user_E, dtype=np.int64),
        sessions_E=np.array(session_E, dtype=np.int64),
        items_E=np.array(item_E, dtype=np.int64),
        watch_s_E=np.array(watch_E, dtype=np.float64),
        liked_E=np.array(liked_E, dtype=np.bool_),
    )


def item_number(name: str, where: str, number: Mapping[str, int]) -> int:
    """Return the place of an item; raise :class:`DataError` for one that is not in the table."""
    if name not in number:
        raise DataError(
            f"{where} has the item {name!r}, which is not in the table of items; give it a "
            "semantic id with moeyard items, or take it out."
        )
    return number[name]


def rows_of(
    path: Path, field: str, columns: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row of a table stands, and what it says; it must have ``columns``."""
    read = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if read is None or not path.is_file():
        raise DataError(f"{field} is {str(path)!r}; give a .csv or .parquet file that is there.")
    yield from read(path, columns)


def _csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, reader.fieldnames or (), columns)
            for row in reader:
                yield f"{path} line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV table ({error}); correct it.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path} cannot be read ({reason}); correct it.") from None


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path} needs a package that is not installed (pyarrow): "
            "pip install 'moeyard[parquet]', or give a CSV file."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            first = 1
            for batch in file.iter_batches(columns=list(columns)):
                for place, row in enumerate(batch.to_pylist(), start=first):
                    yield f"{path} row {place}", row
                first += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path} is not a parquet file ({reason}); correct it.") from None


def _check_columns(path: Path, names: Any, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(
            f"{path} has no column {missing[0]!r}; give a table with {', '.join(columns)}."
        )


def name_of(row: dict[str, Any], column: str, where: str) -> str:
    """Return the name of a user, a session or an item, which may be a whole number.

    Raises :class:`DataError` for anything else.
    """
    value = row[column]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} has the {column} {value!r}; give a word or a whole number.")
    return value.strip()


def _seconds(row: dict[str, Any], where: str) -> float:
    try:
        seconds = float(row["watch_s"])
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(
            f"{where} has {row['watch_s']!r} under watch_s; give a number of seconds from 0 up."
        )
    return seconds


def _liked(row: dict[str, Any], where: str) -> bool:
    text = str(row["liked"]).strip()
    if text not in (*YES, *NO):
        raise DataError(f"{where} has {row['liked']!r} under liked; give 1 or 0.")
    return text in YES
