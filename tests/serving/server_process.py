"""A server as a process in a group of its own, and what its metrics say."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

BIN = Path(sys.executable).parent
START_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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

    def wait_until_ready(self) -> None:
        """Wait for ``moeyard serve`` to say that it is ready."""
        deadline = time.monotonic() + START_S
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
        """End whatever is left of the group, at once."""
        subprocess.run(["pkill", "-9", "-s", str(self.process.pid)], check=False)
