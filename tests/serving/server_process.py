"""A server as a process in a separate group, and what its metrics say."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

BIN = Path(sys.executable).parent
START_S = 300
LISTENING = "0A"
"""In /proc/net/tcp."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listeners(pids: list[int]) -> set[tuple[str, str, int]]:
    """Return name of the process, address and port of every TCP socket these listen on."""
    owners = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                owners[str(link.readlink())] = pid
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            pid = owners.get(f"socket:[{inode}]")
            if state == LISTENING and pid is not None:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                host = socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")
                found.add((name_of(pid), host, int(port, 16)))
    return found


def name_of(pid: int) -> str:
    """Return what a process is: a title of Ray's, a script of Python's, or a program."""
    words = Path(f"/proc/{pid}/cmdline").read_text().strip("\0").split("\0")
    scripts = [word for word in words if word.endswith((".py", "/moeyard"))]
    name = words[0] if words[0].startswith("ray::") else (scripts or words)[0].rpartition("/")[2]
    return name.partition(".")[0].partition(":moeyard")[0].strip()


class Running:
    """A server process and everything it starts."""

    def __init__(self, command: list[str], log: Path, port: int, **env: str) -> None:
        self.log_path, self.port = log, port
        self.base = f"http://127.0.0.1:{port}"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **env},
                cwd="/",
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_until_ready(self, seconds: float = START_S) -> None:
        """Wait for ``moeyard serve`` to say that it is ready."""
        deadline = time.monotonic() + seconds
        while "ready model=" not in self.log():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()
            try:
                with urllib.request.urlopen(f"{self.base}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(self.log())

    def members(self) -> list[str]:
        """Return the process ids of all that the server has started."""
        command = ["pgrep", "-s", str(self.process.pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout.split()

    def replicas(self) -> list[int]:
        """Return the process ids of the replicas."""
        command = ["pgrep", "-s", str(self.process.pid), "-f", "^ray::ServeReplica"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def totals(self, key: str | None = None) -> dict[str, float]:
        """Return the metrics, summed over labels."""
        request = urllib.request.Request(f"{self.base}/metrics")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        text = urllib.request.urlopen(request, timeout=30).read().decode()
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0) + sample.value
        return totals

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.end()

    def end(self) -> None:
        """Kill whatever is left of the group."""
        subprocess.run(["pkill", "-9", "-s", str(self.process.pid)], check=False)


@contextlib.contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Running]:
    """Serve a model with one compute thread, until the block ends; ``folder`` gets the log."""
    port = free_port()
    command = [str(BIN / "moeyard"), "serve", str(model), "--port", str(port)]
    running = Running([*command, "--num-threads", "1", *options], folder / "log.txt", port)
    try:
        running.wait_until_healthy()
        yield running
    finally:
        running.stop()
