"""What grows in the process of Ray's HTTP proxy: a hook for the part ``overload`` of serving.py.

    python benchmarks/serving.py MODEL_DIR overload --proxy-memory FILE [--trace-memory]

Ray's proxy asks this file for what it puts around its application, as it otherwise asks
``serving/proxy_guard.py``, whose answer it gets. A thread then writes a line of JSON every few
seconds: resident bytes, what the C allocator has given out and holds back, and the kinds of Python
objects that the collector knows. With ``--trace-memory`` also the lines of code that hold the most
more memory than a minute after the start (tracemalloc, which slows the proxy down).
"""

import ctypes
import gc
import json
import os
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

from moeyard.serving.proxy_guard import middlewares as of_the_guard

FILE, TRACE = "MOEYARD_PROXY_MEMORY", "MOEYARD_TRACE_PROXY_MEMORY"
"""Variables that say where to write, and whether lines of code are told."""
CALLBACK = "proxy_memory:middlewares"
EVERY_S = 20.0
FIRST_S = 60.0
KINDS, LINES, FRAMES = 400, 25, 1


def middlewares():
    """Return the guard's middlewares, and begin to watch."""
    threading.Thread(target=_watch, name="memory", daemon=True).start()
    return of_the_guard()


class _Mallinfo(ctypes.Structure):
    """What glibc's allocator says, see mallinfo2(3)."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def _watch() -> None:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    is_traced = os.environ.get(TRACE) == "1"
    first = None
    started = time.monotonic()
    if is_traced:
        tracemalloc.start(FRAMES)
    with Path(os.environ[FILE]).open("a") as file:
        while True:
            time.sleep(EVERY_S)
            line = {"seconds": round(time.monotonic() - started, 1), **_now(libc)}
            if is_traced and line["seconds"] > FIRST_S:
                here = tracemalloc.take_snapshot()
                first = first or here
                growth = here.compare_to(first, "lineno")[:LINES]
                line["lines"] = [[str(one.traceback), one.size_diff] for one in growth]
            file.write(json.dumps(line) + "\n")
            file.flush()


def _now(libc: ctypes.CDLL) -> dict[str, object]:
    gc.collect()
    native = libc.mallinfo2()
    kinds = Counter(type(one).__qualname__ for one in gc.get_objects())
    return {
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
        "native_used": native.uordblks + native.hblkhd,
        "native_free": native.fordblks,
        "python_blocks": sys.getallocatedblocks(),
        "threads": threading.active_count(),
        "kinds": dict(kinds.most_common(KINDS)),
    }


def growth(file: Path) -> list[str]:
    """Return what the last line of a file has more than the one after a minute."""
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    later = [line for line in lines if line["seconds"] >= FIRST_S]
    if not later:
        return [f"the proxy ran for less than {FIRST_S:.0f} s"]
    first, last = later[0], later[-1]
    found = [f"proxy, from {first['seconds']:.0f} to {last['seconds']:.0f} s:"]
    for name in ("resident", "native_used", "native_free", "python_blocks", "threads"):
        found.append(f"  {name:<14} {first[name]:>12} {last[name] - first[name]:>+10}")
    more = {name: n - first["kinds"].get(name, 0) for name, n in last["kinds"].items()}
    found += [f"  {name:<30} {n:>+8}" for name, n in Counter(more).most_common(12) if n > 0]
    found += [f"  {size:>+9} {where}" for where, size in last.get("lines", [])]
    return found
