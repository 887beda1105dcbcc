"""A disk of a given speed that gathers no credit while it is idle.

The read limit of a control group counts bytes over a slice of time. A process that computes for a
while may then read faster, until the slice is used up. So reading on demand gets the whole rate on
average, and reading ahead can gain nothing there. A real disk that was idle is not faster later.

Several processes share one disk through a small file. Reads of Python and of C++ take turns on the
same disk (paced_disk.cpp).
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from moeyard.cpp_libraries import COMPILERS
from moeyard.serving.experts.reading.native.library import load

SOURCE = Path(__file__).with_suffix(".cpp")


class PacedDisk:
    """Makes ``os.preadv`` no faster than ``bytes_per_s`` over all threads, read after read.

    So it does with the reads of C++. With ``shared``, over the threads of all processes that name
    the same file.
    """

    def __init__(self, bytes_per_s: float | None = None, shared: Path | None = None) -> None:
        self._library = _build()
        if shared is not None and self._library.paced_share(str(shared).encode()):
            raise OSError(f"{shared} cannot be shared")
        self._read = os.preadv
        self.bytes_per_s = bytes_per_s
        os.preadv = self._paced  # type: ignore[assignment]
        native = load()
        if native is not None:
            native.read_with(ctypes.cast(self._library.paced_preadv, ctypes.c_void_p))

    @property
    def bytes_per_s(self) -> float | None:
        """May change; None = as fast as the disk is."""
        return self._bytes_per_s

    @bytes_per_s.setter
    def bytes_per_s(self, value: float | None) -> None:
        self._bytes_per_s = value
        self._library.paced_rate(value or 0.0)

    def _paced(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        ends_at = self._library.paced_take(float(sum(len(buffer) for buffer in buffers)))
        count = self._read(descriptor, buffers, offset)
        wait_s = ends_at - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        return count


def _build() -> ctypes.CDLL:
    """Compile and load the C++ part."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "paced_disk.so"
        flags = ["-std=c++20", "-O2", "-fPIC", "-pthread", "-shared"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.paced_rate.argtypes = library.paced_take.argtypes = [ctypes.c_double]
    library.paced_rate.restype, library.paced_take.restype = None, ctypes.c_double
    return library
