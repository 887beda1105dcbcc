"""The Ray that ``moeyard serve`` starts for itself: on the loopback, patient, and watched."""

import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ...errors import MoeyardError
from ..proxy_guard import ask_for_guard
from .guardian import SPARE_ORDER, children

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Whatever the name says: without a cluster Ray's address is 127.0.0.1, and so all its ports
    # (GCS, raylet, workers, agents, metrics) listen there and nowhere else.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",  # see replica_port.py
    # Ray's own limits, 10 to 30 s, pass on a machine whose cores are all busy.
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_port_wait_time_s": "180",
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_raylet_client_num_connect_attempts": "180",
    # A proxy counts as dead after three checks; every 10 s means half a minute without answers.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_preload_python_modules": f"{__package__}.warm_up",
}
"""Defaults for the environment; values that are set already win."""
VITAL = frozenset({"gcs_server", "raylet"})
"""Processes that Ray needs to start or replace anything."""
LOOK_EVERY_S = 0.5
MAX_SOCKET_PATH = 107
"""Bytes in the path of a Unix socket, see unix(7)."""
SOCKET_TAIL = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray appends to the temporary folder."""
SHORT_FOLDER = "/tmp"


class RayStartError(MoeyardError):
    """Ray did not start; a fresh process may succeed."""


def prepare() -> Path:
    """Set the environment and return the folder for Ray's files. Call before Ray is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ask_for_guard()
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT_FOLDER
    if len(os.fsencode(folder + SOCKET_TAIL)) > MAX_SOCKET_PATH:
        sys.stderr.write(
            f"note: the path {folder} is too long for Ray's sockets, so Ray's files go to "
            f"{SHORT_FOLDER}/ray; set RAY_TMPDIR to another short folder if you like.\n"
        )
        folder = SHORT_FOLDER
    os.environ[SPARE_ORDER] = str(Path(folder) / "ray" / f"spare-{os.getpid()}")
    return Path(folder) / "ray"


def start(folder: Path, num_cpus: int, object_store_bytes: int | None = None) -> None:
    """Start Ray with its files in ``folder``; raises :class:`RayStartError`.

    ``object_store_bytes`` bounds its shared memory; None: as much as Ray takes by itself.
    """
    import ray

    try:
        # "local": never join, and never shut down, a cluster that is already there.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray raises bare ones
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RayStartError(f"Ray did not start ({reason[0].rstrip('.')})") from error


class Watch:
    """A thread that checks whether the vital processes of our Ray are alive."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death
        self.seen: dict[int, str] = {}
        self._is_closed = threading.Event()
        threading.Thread(target=self._run, name="ray-watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching: what ends from now on is meant to end."""
        self._is_closed.set()

    def _run(self) -> None:
        while not self._is_closed.wait(LOOK_EVERY_S):
            alive = {pid: name for pid, name, state in children(os.getpid()) if state != "Z"}
            dead = [name for pid, name in self.seen.items() if alive.get(pid) != name]
            if dead and not self._is_closed.is_set():
                self._on_death(dead[0])
                return
            self.seen |= {pid: name for pid, name in alive.items() if name in VITAL}


class StartReport:
    """Prints that the server is starting, and every ten seconds for how long."""

    EVERY_S = 10.0

    def __init__(self, model: str, attempt: int) -> None:
        self._head = f"starting model={model}" + (f" attempt={attempt}" if attempt > 1 else "")
        self._started = time.monotonic()
        self._is_closed = threading.Event()
        self.waits_for = "ray"
        self._write(self._head)
        threading.Thread(target=self._run, name="start-report", daemon=True).start()

    def close(self) -> None:
        """Stop printing."""
        self._is_closed.set()

    def _run(self) -> None:
        while not self._is_closed.wait(self.EVERY_S):
            waited_s = time.monotonic() - self._started
            self._write(f"{self._head} waits_for={self.waits_for} waited_s={waited_s:.0f}")

    def _write(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
