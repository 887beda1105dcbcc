"""Array files of numpy: ``.npz`` with arrays by name, ``.npy`` with one."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Array = npt.NDArray[Any]
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for files that are damaged, encrypted or something else."""


class ArrayFile:
    """The arrays of an ``.npz`` file. Opening it reads their headers alone."""

    def __init__(self, path: Path, field: str) -> None:
        """``field`` names the file in messages.

        Raises :class:`DataError` for a file that cannot be read.
        """
        self._path, self._field = path, field
        with self._reading(), zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            shapes = {name.removesuffix(".npy"): _shape_of(archive, name) for name in members}
        self.shapes: dict[str, tuple[int, ...]] = shapes
        """By name."""

    def read(self, name: str) -> Array:
        """Return one of the arrays; raise :class:`DataError` if it cannot be read."""
        with self._reading(), np.load(self._path, allow_pickle=False) as file:
            found: Array = file[name]
        return found

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise DataError(
                f"{self._field} is {str(self._path)!r}, which cannot be read as an .npz file "
                f"({_reason(error)}); write it again with numpy.savez, of numbers and words."
            ) from None


def read_array(path: Path) -> Array:
    """Return the array of an ``.npy`` file; raise :class:`DataError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read as an array ({_reason(error)}); write it again with "
            "numpy.save, of numbers."
        ) from None


def _shape_of(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"{name} is of format {version}")
        shape: tuple[int, ...] = HEADERS[version](file)[0]
    return shape


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
