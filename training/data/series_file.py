"""Series of numbers in a CSV file. N lines, C columns."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...moe.models.series_values import UNOBSERVED


class Series(NamedTuple):
    """Columns of numbers."""

    names: tuple[str, ...]
    values_NC: npt.NDArray[np.float64]
    """NaN where a point was not observed."""
    lines_N: tuple[int, ...]
    """The points' lines in the file, from 1."""


def read_series(
    path: Path,
    time_column: str = "date",
    columns: Sequence[str] | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Series:
    """Read the ``columns`` of a file, or all but ``time_column``; ``advance`` is called per line.

    Raises :class:`DataError` with the line and the cell for what is not a table of numbers.
    """
    if path.suffix.lower() != ".csv":
        raise DataError(f"{str(path)!r} is no .csv file; give one with names in its first line.")
    if not path.is_file():
        raise DataError(f"{str(path)!r} is not there; give another .csv file.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            head = [name.strip() for name in next(lines, [])]
            chosen = _chosen(head, path, time_column, columns)
            found = []
            for cells in lines:
                advance()
                if cells:
                    where = f"{path} line {lines.line_num}"
                    found.append((lines.line_num, _numbers(cells, head, chosen, where)))
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV table ({error}); correct it.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path} cannot be read ({reason}); correct it.") from None
    names = tuple(head[index] for index in chosen)
    values_NC = np.array([row for _, row in found], dtype=np.float64)
    lines_N = tuple(line for line, _ in found)
    return Series(names, values_NC.reshape(len(found), len(names)), lines_N)


def _chosen(
    head: list[str], path: Path, time_column: str, columns: Sequence[str] | None
) -> list[int]:
    """Return the indices of the columns to read."""
    twice = next((name for name in head if head.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has two columns {twice!r}; give each another name.")
    if columns is None:
        columns = [name for name in head if name != time_column]
    missing = next((name for name in columns if name not in head), None)
    if missing is not None:
        raise DataError(
            f"{path} has no column {missing!r}; choose from {', '.join(head)} with data.columns."
        )
    if not columns:
        raise DataError(f"{path} has no column of numbers; give one with names in its first line.")
    return [head.index(name) for name in columns]


def _numbers(cells: list[str], head: list[str], chosen: list[int], where: str) -> list[float]:
    """Return the chosen cells of a line as numbers."""
    if len(cells) != len(head):
        raise DataError(
            f"{where} has {len(cells)} cells, but the first line names {len(head)}; correct it."
        )
    return [_number(cells[index].strip(), head[index], where) for index in chosen]


def _number(cell: str, name: str, where: str) -> float:
    if cell.lower() in UNOBSERVED:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.inf
    if math.isinf(value):
        raise DataError(
            f"{where} has {cell[:40]!r} under {name!r}, which is no number; correct it, leave the "
            "cell empty, or leave the column out with data.columns or data.time_column."
        )
    return value
