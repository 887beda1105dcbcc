"""Several Ray nodes on this machine, each in a process group that can be killed."""

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from moeyard.serving.proxy_guard import CALLBACK, CALLBACK_VARIABLE

from server_process import BIN, free_port

START_S = 120.0


class Nodes:
    """A Ray cluster: a head and nodes that join it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gcs, self._dashboard = free_port(), free_port()
        self.http_ports = [free_port(), free_port()]
        """Where the proxy of the head listens, and that of the other node."""
        self._env = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            CALLBACK_VARIABLE: CALLBACK,
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.http_ports[1]),
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        self._nodes: list[subprocess.Popen[bytes]] = []

    def add(self, cpus: int) -> None:
        """Start a node; the first one is the head."""
        own = ["--node-manager-port", "0", "--object-manager-port", "0"]
        own += ["--dashboard-agent-listen-port", str(free_port()), "--min-worker-port", "0"]
        own += ["--max-worker-port", "0", "--num-cpus", str(cpus), "--block"]
        own += ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(100 << 20)]
        if not self._nodes:
            own += ["--head", "--port", str(self._gcs), "--temp-dir", str(self._folder / "ray")]
            own += ["--dashboard-port", str(self._dashboard), "--include-dashboard", "true"]
            own += ["--ray-client-server-port", str(free_port())]
        else:
            own += ["--address", f"127.0.0.1:{self._gcs}"]
        log = self._folder / f"node{len(self._nodes)}.log"
        with log.open("w") as file:
            node = subprocess.Popen(
                [BIN / "ray", "start", *own],
                env=self._env,
                cwd="/",
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._nodes.append(node)
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def serve(self, *arguments: str) -> str:
        """Run Ray Serve's command on the cluster and return what it prints."""
        address = f"http://127.0.0.1:{self._dashboard}"
        deadline = time.monotonic() + START_S
        while True:  # the dashboard starts last
            done = subprocess.run(
                [BIN / "serve", arguments[0], "-a", address, *arguments[1:]],
                env=self._env,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                return done.stdout
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(1)

    def replicas(self, node: int, application: str = "") -> set[int]:
        """Return the process ids of a node's replicas."""
        title = f"^ray::ServeReplica:{application}"
        command = ["pgrep", "-s", str(self._nodes[node].pid), "-f", title]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return {int(pid) for pid in found.stdout.split()}

    def kill(self, node: int) -> None:
        """End a node and all its processes at once."""
        subprocess.run(["pkill", "-9", "-s", str(self._nodes[node].pid)], check=False)
        self._nodes[node].wait()


@contextlib.contextmanager
def nodes(folder: Path, *cpus: int) -> Iterator[Nodes]:
    """Start a cluster of nodes with so many CPUs each; end all of it afterwards."""
    cluster = Nodes(folder)
    try:
        for number in cpus:
            cluster.add(number)
        yield cluster
    finally:
        for number in reversed(range(len(cluster._nodes))):
            cluster.kill(number)
