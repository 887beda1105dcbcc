"""The bytes of a route file: a header line, chunks of rows, an end (docs/routes.md).

N rows, L MoE layers, E experts, K choices.
"""

import json
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import DataError
from .identity import ModelIdentity
from .rows import Array, Routes

FORMAT, VERSION = "moeyard-routes", 1
LONGEST_HEADER = 1 << 20
LARGEST_CHUNK = 1 << 26
"""Bytes of a chunk's payload; a reader needs memory for one chunk."""
HEAD = struct.Struct("<4sIIII")
"""Kind, rows, choices, bytes of the payload, and crc32 of these fields and the payload."""
ROWS, END = b"ROWS", b"END\n"
TOTAL = struct.Struct("<Q")
"""The payload of the end: the rows of the file."""

NONE = 255
"""How uint8 says -1."""

Number = Literal[
    "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"
]  # fmt: skip
FIELDS = {
    "token": "tokens_N",
    "sequence": "sequences_N",
    "position": "positions_N",
    "step": "steps_N",
    "phase": "phases_N",
    "experts": "experts_NLK",
    "weights": "weights_NLK",
}
"""Columns with a field in :class:`Routes`; all but ``weights`` are in every file."""


class Column(BaseModel):
    """One value, or an array of values, for each row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    dtype: Number
    """Little-endian."""
    shape: tuple[Annotated[int, Field(ge=1)] | Literal["L", "K"], ...] = ()
    """Of a row's values. ``L`` are the MoE layers, ``K`` the choices of the chunk."""

    def shape_of(self, header: "RouteHeader", choices: int) -> tuple[int, ...]:
        """Return the shape of a row's values in a chunk with ``choices``."""
        sizes = {"L": len(header.moe_layers), "K": choices}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)

    def row_bytes(self, header: "RouteHeader", choices: int) -> int:
        """Return the bytes of a row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape_of(header, choices))


WEIGHTS = Column(name="weights", dtype="float32", shape=("L", "K"))


def standard_columns(num_experts: int) -> tuple[Column, ...]:
    """Return the columns of every file: ids have the narrowest type; in uint8, -1 is 255."""
    ids: Number = "int32" if num_experts > 1 << 15 else "int16"
    return (
        Column(name="token", dtype="int32"),
        Column(name="sequence", dtype="int64"),
        Column(name="position", dtype="int32"),
        Column(name="step", dtype="int64"),
        Column(name="phase", dtype="uint8"),
        Column(name="experts", dtype="uint8" if num_experts <= NONE else ids, shape=("L", "K")),
    )


class RouteHeader(BaseModel):
    """The first line of a route file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["moeyard-routes"] = "moeyard-routes"
    version: Literal[1] = 1
    model: ModelIdentity
    moe_layers: tuple[int, ...] = Field(min_length=1)
    """Indices of the decoder layers with experts; L of them."""
    num_experts: int = Field(ge=1, lt=1 << 31)
    k: int = Field(ge=1)
    """Choices of the router's configuration; a chunk may have more or fewer."""
    columns: tuple[Column, ...]
    """In the order of a chunk."""
    written_by: dict[str, Any] = {}
    """What recorded the file: ``program``, and facts of the run."""

    def row_bytes(self, choices: int) -> int:
        """Return the bytes of a row in a chunk with ``choices``."""
        return sum(column.row_bytes(self, choices) for column in self.columns)


def make_header(
    model: ModelIdentity,
    moe_layers: Sequence[int],
    num_experts: int,
    k: int,
    *,
    weights: bool,
    columns: Sequence[Column] = (),
    written_by: dict[str, Any],
) -> RouteHeader:
    """Return a header with the standard columns, then ``columns`` of your own."""
    standard = list(standard_columns(num_experts))
    if weights:
        standard.append(WEIGHTS)
    return RouteHeader(
        model=model,
        moe_layers=tuple(moe_layers),
        num_experts=num_experts,
        k=k,
        columns=(*standard, *columns),
        written_by=written_by,
    )


def header_line(header: RouteHeader) -> bytes:
    """Return the first line of a file."""
    return header.model_dump_json().encode() + b"\n"


def parse_header(line: bytes, name: str) -> RouteHeader:
    """Return the header of file ``name``; raise :class:`DataError` if it is not one."""
    try:
        values = json.loads(line)
        found = values["format"], values["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        found = None, None
    if found[0] != FORMAT:
        raise DataError(
            f"{name} is not a route file; give one that monitor.routes or --record-routes wrote."
        )
    if found[1] != VERSION:
        raise DataError(
            f"{name} has version {found[1]} of the format, and this moeyard reads {VERSION}; use "
            "the version that wrote it."
        )
    try:
        header = RouteHeader.model_validate_json(line)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DataError(
            f"{name} has a damaged header ({place}: {error.errors()[0]['msg']}); record it again."
        ) from None
    by_name = {column.name: column for column in header.columns}
    wanted = standard_columns(header.num_experts)
    for column in (*wanted, WEIGHTS) if "weights" in by_name else wanted:
        if by_name.get(column.name) != column:
            raise DataError(
                f"{name} has no column {column.name!r} of type {column.dtype} and shape "
                f"{list(column.shape)}; record it again."
            )
    if len(by_name) < len(header.columns):
        raise DataError(f"{name} has two columns of one name; record it again.")
    return header


def pack(header: RouteHeader, routes: Routes) -> bytes:
    """Return a chunk of ``routes``, which must have the header's columns."""
    choices = routes.experts_NLK.shape[2]
    parts = []
    for column in header.columns:
        values = _values(routes, column.name)
        parts.append(np.ascontiguousarray(values, f"<{np.dtype(column.dtype).str[1:]}").data)
    return chunk(ROWS, len(routes), choices, b"".join(parts))


def chunk(kind: bytes, rows: int, choices: int, payload: bytes) -> bytes:
    """Return a chunk with its head."""
    fields = HEAD.pack(kind, rows, choices, len(payload), 0)[:-4]
    return fields + struct.pack("<I", checksum(fields, payload)) + payload


def checksum(fields: bytes, payload: bytes) -> int:
    """Return the crc32 of a head's other fields and its payload."""
    return zlib.crc32(payload, zlib.crc32(fields))


def unpack(header: RouteHeader, rows: int, choices: int, payload: bytes) -> Routes:
    """Return the rows of a chunk whose length was checked."""
    found, own, at = {}, {}, 0
    for column in header.columns:
        size = rows * column.row_bytes(header, choices)
        values = np.frombuffer(payload[at : at + size], np.dtype(column.dtype).newbyteorder("<"))
        values = values.reshape(rows, *column.shape_of(header, choices))
        at += size
        if column.name in FIELDS:
            found[FIELDS[column.name]] = values
        else:
            own[column.name] = values
    experts = found["experts_NLK"]
    wide = experts.astype(np.int32)
    found["experts_NLK"] = np.where(experts == NONE, -1, wide) if experts.dtype == "u1" else wide
    return Routes(**found, columns=own)


def _values(routes: Routes, name: str) -> Array:
    found = getattr(routes, FIELDS[name]) if name in FIELDS else routes.columns[name]
    assert found is not None, f"column {name} is missing"
    values: Array = found
    return values
