"""The C++ queue of reads as a loaded library, or the reason why there is none.

``MOEYARD_NATIVE_READS=off`` does without it: then Python reads, which gives the same experts.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .....cpp_libraries import BuildError, built, run_compiler

VARIABLE = "MOEYARD_NATIVE_READS"
SOURCES = Path(__file__).parent / "src"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-pthread", "-fvisibility=hidden", "-w", "-shared")

Int, Pointer, Double = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
CallerStep = ctypes.CFUNCTYPE(ctypes.c_int, Int)
"""Does the next part of a read that is the caller's, by its ticket; see ``Step`` in queue.h."""
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "open": (Pointer, Int, Int, CallerStep),
    "close": (ctypes.c_int, Pointer),
    "free": (None, Pointer),
    "counts": (Pointer, Pointer),
    "plan": (Pointer, Pointer, Int, Pointer, Int, ctypes.c_uint64),
    "free_plan": (None, Pointer),
    "submit": (ctypes.c_int, Pointer, Int, Pointer, Pointer, Int, ctypes.c_int),
    "make_urgent": (ctypes.c_int, Pointer, Int),
    "drop": (None, Pointer, Int),
    "cancel": (ctypes.c_int, Pointer, Int),
    "wait": (ctypes.c_int, Pointer, Pointer, Int, Int, Double),
    "collect": (None, Pointer, Pointer, Pointer, Pointer, Int),
    "progress": (None, Pointer, Pointer),
    "read_with": (Pointer, Pointer),
    "hash": (ctypes.c_uint64, Pointer, Int, Int),
}
"""Result and arguments of the functions in reader.cpp."""
QUICK = ("counts", "submit", "make_urgent", "drop", "cancel", "collect", "progress")
"""Functions that do not wait: they keep Python's lock, since handing it on takes longer."""

log = logging.getLogger(__name__)


class Library:
    """The functions of reader.cpp, by their names there without ``moeyard_reads_``."""

    open: Callable[..., int | None]
    close: Callable[[int], int]
    free: Callable[[int], None]
    counts: Callable[[int], int]
    plan: Callable[[int, int, int, int, int], int | None]
    free_plan: Callable[[int], None]
    submit: Callable[..., int]
    make_urgent: Callable[[int, int], int]
    drop: Callable[[int, int], None]
    cancel: Callable[[int, int], int]
    wait: Callable[[int, int, int, int, float], int]
    collect: Callable[[int, int, int, int, int], None]
    progress: Callable[[int, int], None]
    read_with: Callable[[Any], int]
    hash: Callable[[int, int, int], int]

    def __init__(self, path: Path) -> None:
        """Raises ``OSError`` for a file that cannot be loaded."""
        waiting, quick = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        for name, (result, *arguments) in PROTOTYPES.items():
            function = getattr(quick if name in QUICK else waiting, f"moeyard_reads_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


_loaded: list[Library | None] = []
_loading = threading.Lock()


def load() -> Library | None:
    """Load the library, building it first if needed; the result is kept for the process.

    None without it; a warning says why.
    """
    with _loading:
        if not _loaded:
            _loaded.append(_open())
        return _loaded[0]


def _open() -> Library | None:
    if os.environ.get(VARIABLE) == "off":
        return None
    try:
        return Library(built("expert-reads", "the reader of experts", SOURCES, FLAGS, _build))
    except (BuildError, OSError) as error:
        log.warning("experts are read by Python, not by C++: %s", error)
        return None


def _build(compiler: str, scratch: Path) -> Path:
    library = scratch / "library.so"
    run_compiler([compiler, *FLAGS, str(SOURCES / "reader.cpp"), "-o", str(library)])
    return library
