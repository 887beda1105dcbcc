"""The two ways in which experts are read: by Python, and by C++ that calls ``os.preadv``."""

import ctypes
import os
from collections.abc import Iterator

from moeyard.serving.experts.reading.native import library

READ_AT = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
)


class Piece(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@READ_AT
def read_by_python(descriptor, pieces, count, offset):
    """Call what ``os.preadv`` is now, so that tests may replace it."""
    memory = [
        (ctypes.c_char * piece.length).from_address(piece.start)
        for piece in (Piece * count).from_address(pieces)
    ]
    try:
        return os.preadv(descriptor, [memoryview(part).cast("B") for part in memory], offset)
    except OSError:
        return -1


def use(name: str, monkeypatch) -> Iterator[None]:
    """Read in one of the ways until the generator goes on."""
    if name == "python":
        monkeypatch.setattr(library, "_loaded", [None])
        yield
        return
    native = library.load()
    assert native is not None, "a test without a compiler must be skipped before this"
    native.read_with(ctypes.cast(read_by_python, ctypes.c_void_p))
    yield
    native.read_with(None)
