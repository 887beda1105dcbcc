"""What the scripts that hurt a server share: a model, the server, plain requests."""

import json
import os
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "serving"), str(ROOT / "benchmarks")]

from serve_resilience import Load
from server_process import BIN, Running, free_port, listeners, name_of
from small_model import CONFIG, write_random_model

__all__ = ["Load", "listeners"]


@contextmanager
def served(*options: str, wait: bool = True) -> Iterator[Running]:
    """Serve a small model that can talk for long, under the name ``long``."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        model = Path(folder) / "long"
        write_random_model(model, CONFIG.model_copy(update={"max_positions": 8192}))
        port = free_port()
        command = [str(BIN / "moeyard"), "serve", str(model), "--port", str(port)]
        running = Running([*command, "--num-threads", "1", *options], Path(folder) / "log", port)
        try:
            if wait:
                running.wait_until_ready(300)
            yield running
        finally:
            running.process.kill()
            running.process.wait()
            running.end()


def processes(running: Running) -> dict[str, list[int]]:
    """Return the server's processes by name."""
    found = defaultdict(list)
    for pid in map(int, running.members()):
        try:
            found[name_of(pid)].append(pid)
        except OSError:  # it has gone meanwhile
            continue
    return found


def ask(base: str, timeout_s: float = 30.0, **body: object) -> dict:
    """Return a completion."""
    values = {"model": "long", "prompt": "hello 1", "max_tokens": 4, "temperature": 0, **body}
    request = urllib.request.Request(f"{base}/v1/completions", data=json.dumps(values).encode())
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


def read(base: str, path: str, timeout_s: float = 10.0) -> tuple[int, bytes]:
    """Return status and body of a path."""
    try:
        with urllib.request.urlopen(f"{base}{path}", timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait_for(condition: Callable[[], bool], seconds: float) -> float | None:
    """Return how long it took until ``condition`` held, or None when it did not in time."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if condition():
            return time.monotonic() - started
        time.sleep(0.1)
    return None


def memory_mb(pid: int) -> float:
    """Return a process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def num_files(pid: int) -> int:
    """Return how many files a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def connect(port: int) -> socket.socket:
    """Open a connection to the server."""
    return socket.create_connection(("127.0.0.1", port), timeout=30)
