"""Runs a command with a disk of known speed and little memory: cgroups (v1), as root.

Reads of the disk that a folder lies on are limited in bytes per second, buffered or direct. Memory
counts the page cache of the files that the command reads. Caches are dropped before each run.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
POLL_S = 0.1
REMOVE_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command may use; None = all."""

    read_mb_s: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a command."""

    result: dict[str, Any] | None
    """The last line of its output that is a JSON object; None if it failed."""
    seconds: float
    peak_bytes: int
    """Of its processes and of the page cache that they filled."""
    peak_anonymous_bytes: int
    """Without the page cache, seen every 0.1 s."""
    disk_bytes: int
    """Read from the disk, from start to end."""
    problem: str = ""
    """Why there is no result."""


class NoGroupsError(RuntimeError):
    """This machine has no cgroups (v1) that this user may make."""


def run(
    command: list[str], limits: Limits, folder: Path, environment: dict[str, str] | None = None
) -> Outcome:
    """Run ``command`` in groups of its own, which are removed whatever happens."""
    with _groups(limits, folder) as (memory, disk), tempfile.TemporaryFile() as output:
        _drop_caches()
        join = "".join(f"echo $$ > {group}/cgroup.procs && " for group in (memory, disk))
        started = time.monotonic()
        child = subprocess.Popen(
            ["sh", "-c", join + 'exec "$@"', "sh", *command],
            stdout=output,
            stderr=subprocess.PIPE,
            env=os.environ | (environment or {}),
        )
        try:
            anonymous = _watch(child, memory)
        finally:
            child.kill()
            errors = child.communicate()[1].decode(errors="replace")
        seconds = time.monotonic() - started
        read = _bytes_read(disk)
        peak = int((memory / "memory.max_usage_in_bytes").read_text())
        output.seek(0)
        result = _last_object(output.read().decode(errors="replace"))
    problem = "" if child.returncode == 0 else _problem(child.returncode, errors)
    return Outcome(None if problem else result, seconds, peak, anonymous, read, problem)


@contextlib.contextmanager
def _groups(limits: Limits, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the group that counts memory and the one that counts reads."""
    name = f"moeyard-offloading-{os.getpid()}"
    memory, disk = CGROUPS / "memory" / name, CGROUPS / "blkio" / name
    groups = [memory, disk]
    try:
        for group in groups:
            try:
                group.mkdir()
            except OSError as error:
                raise NoGroupsError(f"{group} cannot be made ({error.strerror})") from None
        if limits.memory_bytes is not None:
            (memory / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
        if limits.read_mb_s is not None:
            rate = f"{_disk_of(folder)} {int(limits.read_mb_s * 1e6)}"
            (disk / "blkio.throttle.read_bps_device").write_text(rate)
        yield memory, disk
    finally:
        for group in groups:
            _remove(group)


def _disk_of(folder: Path) -> str:
    """Return the numbers of the whole disk, since a partition cannot be limited."""
    number = folder.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    device = Path("/sys/dev/block") / name
    if (device / "partition").exists():
        return (device.resolve().parent / "dev").read_text().strip()
    return name


def _watch(child: subprocess.Popen, memory: Path) -> int:
    """Wait for the child and return the most anonymous bytes that were seen."""
    most = 0
    while child.poll() is None:
        lines = dict(line.split() for line in (memory / "memory.stat").read_text().splitlines())
        most = max(most, int(lines["total_rss"]))
        time.sleep(POLL_S)
    return most


def _bytes_read(group: Path) -> int:
    """Return the bytes of all disks."""
    lines = (group / "blkio.throttle.io_service_bytes").read_text().splitlines()
    return sum(int(line.split()[2]) for line in lines if line.split()[1] == "Read")


def _remove(group: Path) -> None:
    """Remove a group; the kernel takes a moment to see that its processes have ended."""
    until = time.monotonic() + REMOVE_S
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(POLL_S)


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def _last_object(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def _problem(status: int, errors: str) -> str:
    if status == -9:
        return "killed: it needs more memory"
    lines = [line for line in errors.splitlines() if line.strip()]
    return f"status {status}: {lines[-1] if lines else ''}"[:200]
