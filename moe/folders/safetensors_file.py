"""Safetensors files: where each tensor is, and reads into memory we own."""

import json
import os
import stat
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ModelFileError
from .file_reader import FileReader, buffer_of

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset in the file."""
    num_bytes: int

    @property
    def end(self) -> int:
        """Offset behind it."""
        return self.start + self.num_bytes

    def is_stored_as(self, memory: Tensor) -> bool:
        """Say whether the stored bytes can be read straight into a tensor of the same shape."""
        return self.dtype == memory.dtype and memory.is_contiguous() and memory.is_cpu


class SafetensorsFile:
    """An open safetensors file; reading is thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a named pipe would wait for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ModelFileError(
                f"{path} cannot be opened ({error.strerror}); restore the file."
            ) from None
        self.reader = FileReader(path, self._descriptor)
        try:
            self.entries = self._read_header()
        except ModelFileError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.reader.close()
        os.close(self._descriptor)

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill the contiguous tensor ``out`` with tensor ``name``; types are converted.

        Raises :class:`ModelFileError` when shapes differ and ``OSError`` when bytes are missing.
        """
        self.check_shape(name, tuple(out.shape))
        self._read(self.entries[name], out)

    def read_part(self, name: str, index: int, out: Tensor) -> None:
        """Fill ``out`` with element ``index`` of the first dimension of ``name``; reads no more.

        For experts that share one tensor ``[E, ...]``. Raises the errors of :meth:`read_into`.
        """
        self._read(self.part_entry(name, index, tuple(out.shape)), out)

    def part_entry(self, name: str, index: int, shape: tuple[int, ...]) -> TensorEntry:
        """Return where element ``index`` of the first dimension of ``name`` is, of ``shape``.

        Raises :class:`ModelFileError` when it has another shape.
        """
        entry = self.entries[name]
        length = entry.shape[0] if entry.shape else 0
        self.check_shape(name, (length, *shape))
        assert 0 <= index < length, f"{name} has no part {index}"
        num_bytes = entry.num_bytes // length
        return TensorEntry(entry.dtype, shape, entry.start + index * num_bytes, num_bytes)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise :class:`ModelFileError` when tensor ``name`` has another shape."""
        found = self.entries[name].shape
        if found != shape:
            raise ModelFileError(
                f"{self.path.name}: {name} has shape {list(found)}, config.json asks for "
                f"{list(shape)}; the weights belong to another configuration."
            )

    def _read(self, entry: TensorEntry, out: Tensor) -> None:
        if entry.is_stored_as(out):
            self.reader.read([buffer_of(out)], entry.start)
        else:
            raw = torch.empty(entry.shape, dtype=entry.dtype)
            self.reader.read([buffer_of(raw)], entry.start)
            out.copy_(raw)

    def _read_header(self) -> dict[str, TensorEntry]:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{self.path} is not a file; copy the folder again.")
        size = status.st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ModelFileError(
                f"{self.path} is not a complete safetensors file (header of {length} bytes in a "
                f"file of {size}); copy it again."
            )
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            header.pop("__metadata__", None)
            entries = {
                name: self._entry(name, values, 8 + length, size) for name, values in header.items()
            }
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{self.path} has a damaged header; copy it again.") from None
        self._check_apart(entries)
        return entries

    def _check_apart(self, entries: dict[str, TensorEntry]) -> None:
        """Refuse tensors that share bytes: no writer makes them, so one of them must be wrong."""
        filled = [(name, entry) for name, entry in entries.items() if entry.num_bytes]
        spans = sorted((entry.start, entry.num_bytes, name) for name, entry in filled)
        for (start, num_bytes, name), (next_start, _, following) in pairwise(spans):
            if next_start < start + num_bytes:
                raise ModelFileError(
                    f"{self.path}: {name} and {following} share bytes; copy it again."
                )

    def _entry(self, name: str, values: dict, base: int, file_size: int) -> TensorEntry:
        if values["dtype"] not in STORED_DTYPES:
            raise ModelFileError(
                f"{self.path}: {name} has type {values['dtype']}; convert it to BF16 or F32."
            )
        dtype = STORED_DTYPES[values["dtype"]]
        shape = tuple(int(side) for side in values["shape"])
        start, end = (int(offset) for offset in values["data_offsets"])
        if not 0 <= start <= end or end - start != prod(shape) * dtype.itemsize:
            raise ModelFileError(f"{self.path}: {name} has offsets that do not fit its shape.")
        if base + end > file_size:
            raise ModelFileError(
                f"{self.path} is cut short: {name} ends at byte {base + end}, the file has "
                f"{file_size}; copy it again."
            )
        return TensorEntry(dtype, shape, base + start, end - start)
