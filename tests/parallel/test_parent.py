"""A worker ends with the process that started it, and not with the thread that did."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WORKER = """
import sys, time
from moeyard.parallel import parent
parent.LOOK_EVERY_S = 0.05
parent.die_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
AGENT = """
import subprocess, sys, threading, time

def start():
    worker = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b"ready\\n"
    found.append(worker)

found = []
if sys.argv[1] == "thread":
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
print(found[0].pid, flush=True)
sys.stdin.readline()
time.sleep(0.2)
print(found[0].poll(), flush=True)
sys.stdin.read()
"""


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize("starter", ["main", "thread"])
def test_a_worker_ends_with_its_parent_and_not_with_a_thread(starter):
    command = [sys.executable, "-c", AGENT, starter, WORKER]
    agent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = int(agent.stdout.readline())
    agent.stdin.write("\n")
    agent.stdin.flush()
    assert agent.stdout.readline() == "None\n", "the worker ended with the thread"
    assert is_alive(worker)
    if starter == "main":
        os.kill(worker, signal.SIGSTOP)  # the kernel ends even a process that cannot run
    agent.kill()
    agent.wait()
    end = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(worker)
