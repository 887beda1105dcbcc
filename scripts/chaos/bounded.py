"""Run what may hang, eat memory or die in a child process, and report how it ended.

The child is a fork, so the libraries are loaded once for all rows.
"""

import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serving")]

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moeyard.errors import MoeyardError

LIMIT_S = 40
"""Of computing, so that other work on the machine turns no row into a fault."""
CLOCK_LIMIT_S = 240
"""For what waits without computing."""
MEMORY_BYTES = 3 << 30
"""Of address space, beyond what the parent has."""
LOADED = (AutoTokenizer, PreTrainedTokenizerFast)
"""transformers imports them when asked; the parent does, and not every child."""
FAULTS = ("HANG", "DIED", "TRACEBACK", "WRONG")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a child."""

    kind: str
    """``refused``, ``served`` or one of :data:`FAULTS`."""
    text: str
    seconds: float
    """Of computing."""
    clock_s: float
    peak_mb: float


def bounded(work: Callable[[], str]) -> Outcome:
    """Run ``work`` in a child; it returns what it found, or raises."""
    read_end, write_end = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _be_the_child(work, write_end)
    os.close(write_end)
    found = b""
    while True:
        left = started + CLOCK_LIMIT_S - time.monotonic()
        if left <= 0 or not select.select([read_end], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(read_end, 1 << 16)
        if not piece:
            break
        found += piece
    os.close(read_end)
    _, status, usage = os.wait4(child, 0)
    clock_s, peak_mb = time.monotonic() - started, usage.ru_maxrss / 1024
    figures = (usage.ru_utime + usage.ru_stime, clock_s, peak_mb)
    if not found:
        ended = os.waitstatus_to_exitcode(status)
        kind = "HANG" if clock_s >= CLOCK_LIMIT_S or ended == -signal.SIGXCPU else "DIED"
        return Outcome(kind, f"exit code {ended}", *figures)
    kind, text = json.loads(found)
    return Outcome(kind, text, *figures)


def _be_the_child(work: Callable[[], str], write_end: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
    try:
        result = ("served", work())
    except MoeyardError as error:
        kind = "refused" if "\n" not in str(error) else "WRONG"
        result = (kind, str(error))
    except BaseException as error:
        result = ("TRACEBACK", f"{type(error).__name__}: {error}")
        traceback.print_exc()
    os.write(write_end, json.dumps(result).encode())
    os._exit(0)


def report(name: str, outcome: Outcome) -> bool:
    """Print one row (seconds of computing and of the clock); return whether it is a fault."""
    text = re.sub(r"/\S*moeyard-chaos-\w+/", "", " ".join(outcome.text.split()))[:140]
    figures = f"{outcome.seconds:5.1f} s {outcome.clock_s:6.1f} s {outcome.peak_mb:5.0f} MB"
    print(f"{name:34} {outcome.kind:9} {figures}  {text}", flush=True)
    return outcome.kind in FAULTS


def finish(title: str, faults: list[str], rows: int) -> None:
    """Print the sum and end with 1 where there was a fault."""
    print(
        f"\n{title}: {rows} rows, {len(faults)} faults{': ' if faults else ''}{', '.join(faults)}"
    )
    sys.exit(bool(faults))


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="moeyard-chaos-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
