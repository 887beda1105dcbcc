"""Read series from a CSV table, and continue its dates.

C columns of values, T rows.
"""

import calendar
import csv
import math
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from ..moe.models.series_values import UNOBSERVED


class SeriesTable(NamedTuple):
    """The series of a table."""

    columns: tuple[str, ...]
    values_CT: np.ndarray
    """fp64, NaN where a point was not observed."""
    date_column: str | None
    """The column of dates; None if there is none."""
    dates_T: tuple[str, ...]
    """As they are written; empty without such a column."""


def read_table(path: Path, columns: Sequence[str] | None = None) -> SeriesTable:
    """Read a table whose first line names its columns, and whose rows follow each other in time.

    The first column of ISO dates, if there is one, is that of the dates. ``columns`` are those to
    read as series; None = all others. Cells of :data:`UNOBSERVED`, in any case, were not observed.
    Raises :class:`DataError`, which names line and column.
    """
    lines = _read_lines(path)
    if len(lines) < 2:
        raise DataError(f"{path} has no rows of values; give a line of names and rows below it.")
    (_, names), *rows = lines
    names = [name.strip() or f"column {place + 1}" for place, name in enumerate(names)]
    if all(_number(name) is not None for name in names):
        raise DataError(f"{path} has numbers in its first line; put the columns' names there.")
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(
                f"{path} line {line} has {len(row)} cells, but the first line names {len(names)} "
                "columns; correct it."
            )
    place = next((p for p in range(len(names)) if _date(rows[0][1][p]) is not None), None)
    date_column = None if place is None else names[place]
    dates_T = () if place is None else tuple(row[place].strip() for _, row in rows)
    wanted = _choose(path, names, date_column, columns)
    values_CT = [_values(path, names[index], index, rows) for index in wanted]
    return SeriesTable(
        tuple(names[index] for index in wanted), np.array(values_CT), date_column, dates_T
    )


def _read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return the rows that are not empty, with the numbers of their lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV table ({error}); correct it.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path} cannot be read ({reason}); give a CSV table.") from None


def _choose(
    path: Path, names: list[str], date_column: str | None, columns: Sequence[str] | None
) -> list[int]:
    """Return the places of the columns to read."""
    offered = [name for name in names if name != date_column]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has two columns with the name {twice!r}; rename one.")
    if not offered:
        raise DataError(f"{path} has dates, but no column of values; add one.")
    for name in columns or ():
        if name not in offered:
            raise DataError(
                f"--columns names {name!r}, but the columns of values in {path} are "
                f"{', '.join(offered)}; use these."
            )
    return [names.index(name) for name in dict.fromkeys(columns or offered)]


def _values(path: Path, name: str, place: int, rows: list[tuple[int, list[str]]]) -> np.ndarray:
    """Return the numbers of a column."""
    found = np.full(len(rows), np.nan)
    for index, (line, row) in enumerate(rows):
        cell = row[place].strip()
        if cell.lower() in UNOBSERVED:
            continue
        number = _number(cell)
        if number is None or math.isinf(number):
            raise DataError(
                f"{path} line {line} has {cell[:40]!r} in column {name!r}, which is not a number; "
                "correct it, leave it empty, or name other columns with --columns."
            )
        found[index] = number
    return found


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _date(cell: str) -> datetime | None:
    """Return an ISO date, also one of a month: ``2016-07``."""
    cell = cell.strip()
    if cell[4:5] != "-":  # without hyphens a date would be a number
        return None
    try:
        return datetime.fromisoformat(f"{cell}-01" if len(cell) == len("2016-07") else cell)
    except ValueError:
        return None


def continue_dates(table: SeriesTable, horizon: int) -> list[str] | None:
    """Return the ``horizon`` dates that follow a table's, as it writes them.

    Dates go on if they are equally far from each other, in seconds or in months. None if they are
    not, or if the table has none. Raises :class:`DataError` for a cell that is not a date, and for
    dates that do not rise.
    """
    written = table.dates_T
    dates: list[datetime] = []
    for cell in written:
        date = _date(cell)
        if date is None:
            raise DataError(
                f"column {table.date_column!r} has {cell[:40]!r}, which is not a date as in "
                f"{written[0]!r}; correct it."
            )
        if dates and (date.tzinfo is None) != (dates[-1].tzinfo is None):
            raise DataError(f"the dates {written[0]!r} and {cell!r} have not both a time zone.")
        if dates and date <= dates[-1]:
            raise DataError(
                f"column {table.date_column!r} has {cell!r} after {written[len(dates) - 1]!r}; "
                "sort the rows by date, one for each."
            )
        dates.append(date)
    if len(dates) < 2:
        return None
    months = _months(dates)
    steps = {after - before for before, after in pairwise(dates)}
    if months is None and len(steps) > 1:
        return None
    try:
        if months is not None:
            return [_written(written[0], _later(dates, months * n)) for n in range(1, horizon + 1)]
        (step,) = steps
        return [_written(written[0], dates[-1] + step * n) for n in range(1, horizon + 1)]
    except OverflowError:
        return None  # after the year 9999


def _months(dates: list[datetime]) -> int | None:
    """Return the months between neighbours, if they are equally many and the days are alike."""
    numbers = [date.year * 12 + date.month for date in dates]
    steps = {after - before for before, after in pairwise(numbers)}
    are_ends = all(_is_end(date) for date in dates)
    if len(steps) != 1 or not (are_ends or len({date.day for date in dates}) == 1):
        return None
    if len({date.time() for date in dates}) > 1:
        return None
    return steps.pop() or None


def _later(dates: list[datetime], months: int) -> datetime:
    """Return the date so many months after the last one."""
    last = dates[-1]
    year, month = divmod(last.year * 12 + last.month - 1 + months, 12)
    if year > datetime.max.year:
        raise OverflowError
    end = calendar.monthrange(year, month + 1)[1]
    day = end if all(_is_end(date) for date in dates) else min(last.day, end)
    return last.replace(year=year, month=month + 1, day=day)


def _is_end(date: datetime) -> bool:
    return date.day == calendar.monthrange(date.year, date.month)[1]


def _written(sample: str, date: datetime) -> str:
    """Return a date as ``sample`` is written."""
    if len(sample) == len("2016-07"):
        return f"{date:%Y-%m}"
    if len(sample) == len("2016-07-01") and date.time() == datetime.min.time():
        return date.date().isoformat()
    clock = sample[len("2016-07-01T") :].replace("Z", "").split("+")[0].split("-")[0]
    timespec = "minutes" if clock.count(":") == 1 and not date.second else "auto"
    text = date.isoformat("T" if sample[10:11] == "T" else " ", timespec=timespec)
    return text.replace("+00:00", "Z") if sample.endswith("Z") else text
