"""Processes in namespaces, each with a fixed share of the cores.

A process becomes, one after another: ``setpriv``, which makes it die with the benchmark;
``nsenter``, which takes it into its network; ``unshare``, which starts its child as process 1 of a
new process namespace. All processes of such a namespace die with its process 1. ``sh`` then takes
each rank into its control group, whose quota bounds it even where the other cores are idle.
"""

import errno
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from moeyard.errors import MoeyardError

from network_links import ENDS_S, PREFIX

CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000
"""A rank that has used its quota waits for the next period. The default of 100 ms would let a rank
with half a core stand still for 50 ms in the middle of an exchange."""
GRACE_S = 20.0
"""Ranks have this long to end after the first of them has failed."""
LOOK_EVERY_S = 0.05
TAKE_SHARE = 'echo 0 > "{groups}/{prefix}rank$RANK/cgroup.procs" && exec "$@"'


def add_share(rank: int, cores: float) -> None:
    """Make the control group of a rank that may use ``cores`` cores."""
    folder = CPU_GROUPS / f"{PREFIX}rank{rank}"
    try:
        folder.mkdir()
        (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (folder / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD_US)))
    except OSError as error:
        raise MoeyardError(
            f"a share of the cores cannot be set in {CPU_GROUPS} ({error.strerror}); start this as "
            "root where version 1 of control groups has cpu quotas."
        ) from error


def remove_shares() -> None:
    """Remove the control groups of all ranks, whose processes have been killed."""
    deadline = time.monotonic() + ENDS_S
    for folder in CPU_GROUPS.glob(f"{PREFIX}rank*"):
        while True:
            try:
                folder.rmdir()
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)  # a killed process leaves its group a moment later


def with_share(command: Sequence[str]) -> list[str]:
    """Return a command that runs ``command`` in the share of the rank that RANK names."""
    script = TAKE_SHARE.format(groups=CPU_GROUPS, prefix=PREFIX)
    return ["sh", "-c", script, "sh", *command]


@dataclass
class Process:
    """A running process, by the name that errors use, and the file of its output."""

    name: str
    popen: subprocess.Popen
    file: IO[bytes]

    def output(self) -> str:
        """Return what it has printed so far."""
        self.file.seek(0)
        return self.file.read().decode(errors="replace")


def start(name: str, namespace: str, command: Sequence[str], env: Mapping[str, str]) -> Process:
    """Start a process in a network namespace and a process namespace of its own."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - read after the process has ended
    enter = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net=/run/netns/{namespace}"]
    enter += ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
    popen = subprocess.Popen(
        [*enter, *command],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the benchmark, which then kills it
    )
    return Process(name, popen, file)


def wait(processes: Sequence[Process], timeout_s: float) -> list[str]:
    """Wait for all and return their outputs; a failure or the time limit is an error."""
    deadline = time.monotonic() + timeout_s
    failed: Process | None = None
    while None in [process.popen.poll() for process in processes]:
        if time.monotonic() > deadline:
            break
        if failed is None:
            failed = next((p for p in processes if p.popen.returncode), None)
            if failed is not None:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(LOOK_EVERY_S)
    late = [process for process in processes if process.popen.returncode is None]
    kill(processes)
    failed = failed or next((p for p in processes if p.popen.returncode and p not in late), None)
    if failed is not None:
        words = failed.output().strip() or "it printed nothing"
        raise MoeyardError(f"{failed.name} ended with {failed.popen.returncode}: {words[-2000:]}")
    if late:
        words = late[0].output().strip() or "nothing"
        raise MoeyardError(
            f"{late[0].name} was still running after {timeout_s:g} s; raise timeout_s, or see what "
            f"it printed: {words[-2000:]}"
        )
    return [process.output() for process in processes]


def kill(processes: Sequence[Process]) -> None:
    """Kill what still runs, and wait until it has ended."""
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
    for process in processes:
        process.popen.wait()
