"""Memory of a process that serves for long."""

import ctypes
import subprocess
import sys

import pytest

WATCHED = """
import time
from pathlib import Path
from moeyard.settled import trim_now_and_then

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

before = resident()
blocks = [bytes(4000) for _ in range(25_000)]
kept = blocks[::100]
del blocks
held = resident() - before
trim_now_and_then(every_s=0.05)
until = time.monotonic() + 20
while resident() - before > 20 and time.monotonic() < until:
    time.sleep(0.01)
print(len(kept), held, resident() - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this system has no glibc"
)
def test_freed_memory_between_blocks_in_use_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True)
    kept, held, after = map(int, done.stdout.split())
    assert kept == 250
    assert held > 80, "in MiB: what lies between the kept blocks stays"
    assert after <= 20
