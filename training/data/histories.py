"""Histories of users, for a model that recommends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from .documents import RECORD_SUFFIXES, TextFile
from .records import NotJson, read_records
from .session_log import name_of, rows_of

FIELD = "HISTORY"


def read_histories(path: Path) -> dict[str, list[str]]:
    """Return the items of each user, the oldest first, by user.

    A table has the columns ``user`` and ``item`` and is in order of time. A JSON file has objects
    such as ``{"user": "u1", "items": ["a", "b"]}``. Raises :class:`DataError`.
    """
    found: dict[str, list[str]] = {}
    if path.suffix.lower() in RECORD_SUFFIXES:
        for where, record in _records(path):
            user = name_of(record, "user", where)
            if user in found:
                raise DataError(f"{where} has the user {user!r} again; give each user once.")
            items = record["items"]
            if not isinstance(items, list) or not items:
                raise DataError(f"{where} has the items {items!r}; give a list of one or more.")
            found[user] = [name_of({"item": item}, "item", where) for item in items]
    else:
        for where, row in rows_of(path, FIELD, ("user", "item")):
            user = name_of(row, "user", where)
            found.setdefault(user, []).append(name_of(row, "item", where))
    if not found:
        raise DataError(f"{path} has no user; give a file with some.")
    return found


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each object stands, and what it says; it has a user and items."""
    if not path.is_file():
        raise DataError(f"{FIELD} is {str(path)!r}, which is not there; give another.")
    try:
        for where, record in read_records(TextFile(path, str(path), FIELD).blocks()):
            if not isinstance(record, dict) or not {"user", "items"} <= record.keys():
                raise DataError(f"{path} {where} has no user and items; correct it.")
            yield f"{path} {where}", record
    except NotJson as error:
        raise DataError(f"{path} {error.where} is not JSON; correct it.") from None
