"""Read route files, chunk by chunk; a file that was cut short is read as far as it is whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...errors import DataError
from ..config.model import LayersConfig
from .format import (
    END,
    HEAD,
    LARGEST_CHUNK,
    LONGEST_HEADER,
    ROWS,
    TOTAL,
    RouteHeader,
    checksum,
    parse_header,
    unpack,
)
from .identity import identity_of
from .rows import Routes, joined

SUFFIX = ".routes"


class RouteFile:
    """A route file. Opening reads its header; raises :class:`DataError` if it is not one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open(path) as file:
            self.header: RouteHeader = parse_header(file.readline(LONGEST_HEADER), str(path))
            self.first_chunk = file.tell()
            """Where the header ends."""
        self.damage: str | None = None
        """After :meth:`chunks`: one sentence if the file was cut short or is damaged, else None."""

    def chunks(self) -> Iterator[Routes]:
        """Yield the rows in the order they were written.

        Raises :class:`DataError` for expert ids that do not exist.
        """
        for rows, _ in self.chunks_and_ends():
            yield rows

    def chunks_and_ends(self) -> Iterator[tuple[Routes, int]]:
        """Yield each chunk's rows and the place in the file where the chunk ends."""
        seen, self.damage = 0, "ends in the middle"
        with _open(self.path) as file:
            file.seek(self.first_chunk)
            while True:
                found = self._next(file)
                if isinstance(found, Routes):
                    self._check_ids(found, seen)
                    seen += len(found)
                    yield found, file.tell()
                    continue
                if isinstance(found, str):
                    self.damage = f"{self.path} {found}; {seen} rows before that are read."
                else:
                    self.damage = None
                    if found != seen:
                        self.damage = f"{self.path} has {seen} rows, but its end says {found}."
                return

    def read(self) -> Routes:
        """Return all rows; raise :class:`DataError` if there is not one."""
        return _joined(list(self.chunks()), str(self.path))

    def check_model(self, config: LayersConfig) -> None:
        """Raise :class:`DataError` unless the routes are those of this architecture."""
        num_experts = config.moe.num_experts if config.moe else 0
        self.check_sizes(config.moe_layers, num_experts, identity_of(config).architecture)

    def check_sizes(self, moe_layers: Sequence[int], num_experts: int, architecture: str) -> None:
        """Raise :class:`DataError` unless the routes are those of a model with these values."""
        theirs = self.header
        for what, recorded, own in (
            ("MoE layers", len(theirs.moe_layers), len(moe_layers)),
            ("experts per layer", theirs.num_experts, num_experts),
            ("the architecture", theirs.model.architecture, architecture),
        ):
            if recorded != own:
                raise DataError(
                    f"{self.path} belongs to another model: {what} {recorded}, this one has {own}; "
                    "give routes of this model, or the model that they were recorded from."
                )

    def _next(self, file: BinaryIO) -> Routes | int | str:
        """Return the next chunk's rows, the total at the file's end, or what is wrong."""
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return "was cut short, or is still being written"
        kind, rows, choices, num_bytes, crc = HEAD.unpack(head)
        fitting = TOTAL.size if kind == END else rows * self.header.row_bytes(choices)
        is_known = kind == END or (kind == ROWS and rows)
        if not is_known or num_bytes != fitting or num_bytes > LARGEST_CHUNK:
            return f"is damaged at byte {file.tell() - HEAD.size}"
        payload = file.read(num_bytes)
        if len(payload) < num_bytes:
            return "was cut short, or is still being written"
        if checksum(head[:-4], payload) != crc:
            return f"is damaged before byte {file.tell()}: the checksum of a chunk is wrong"
        if kind == ROWS:
            return unpack(self.header, rows, choices, payload)
        return int(TOTAL.unpack(payload)[0])

    def _check_ids(self, routes: Routes, seen: int) -> None:
        experts_NLK = routes.experts_NLK
        bad = (experts_NLK < -1) | (experts_NLK >= self.header.num_experts)
        if bad.any():
            row, layer, choice = (int(index[0]) for index in np.nonzero(bad))
            expert = experts_NLK[row, layer, choice]
            raise DataError(
                f"{self.path} has expert {expert} in row {seen + row} of MoE layer {layer}, but "
                f"there are {self.header.num_experts} experts; record it again."
            )


def route_files(paths: Sequence[Path]) -> list[RouteFile]:
    """Open files, and all files of folders; they must be of one recording."""
    found = []
    for path in paths:
        inside = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path} has no file *{SUFFIX}; give a folder that has, or a file.")
        found += [RouteFile(file) for file in inside]
    for file in found[1:]:
        if file.header != found[0].header:
            raise DataError(
                f"{file.path} is of another recording than {found[0].path}; give files of one."
            )
    return found


def read_routes(*paths: Path) -> Routes:
    """Return the rows of files and folders by step, then sequence, then position.

    The files of a run's ranks become the rows of one process. Raises :class:`DataError` for files
    that are damaged, cut short, of several recordings or without rows.
    """
    files = route_files(paths)
    parts: list[Routes] = []
    for file in files:
        parts += file.chunks()
        if file.damage is not None:
            raise DataError(file.damage)
    rows = _joined(parts, ", ".join(str(file.path) for file in files))
    return rows.select(np.lexsort((rows.positions_N, rows.sequences_N, rows.steps_N)))


def _joined(parts: list[Routes], name: str) -> Routes:
    if not parts:
        raise DataError(f"{name} has no rows; record some.")
    return joined(parts)


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a file; give a route file.")
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a route file.") from None
