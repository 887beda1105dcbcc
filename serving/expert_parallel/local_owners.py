"""Owners as plain processes of this host, without Ray: for tests, benchmarks and programs."""

import json
import select
import subprocess
import sys
import threading
from collections.abc import Sequence

from .channel import LostPeerError
from .connecting import Address
from .owner_spec import OwnerSpec

COMMAND = (sys.executable, "-m", "moeyard.serving.expert_parallel.owner_process")


class LocalOwners:
    """A process for each owner. See :class:`.Hiring`."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = list(command)
        self._specs: dict[int, OwnerSpec] = {}
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._addresses: dict[int, Address] = {}
        self._lock = threading.Lock()

    def pid(self, index: int) -> int:
        """Return the number of an owner's process."""
        return self._processes[index].pid

    def start(self, spec: OwnerSpec) -> None:
        """See :class:`.Hiring`."""
        with self._lock:
            self._specs[spec.index] = spec
            self._start(spec.index)

    def address(self, index: int, timeout_s: float) -> Address:
        """See :class:`.Hiring`."""
        with self._lock:
            if self._processes[index].poll() is not None:
                self._start(index)
            if index not in self._addresses:
                output = self._processes[index].stdout
                assert output is not None, "it is a pipe"
                waiting = select.poll()  # select.select takes no numbers of files above 1023
                waiting.register(output, select.POLLIN)
                ready = waiting.poll(1000 * timeout_s)
                line = output.readline() if ready else ""
                if not line:
                    raise LostPeerError("it is not ready in time" if not ready else "it has ended")
                self._addresses[index] = Address(*json.loads(line))
            return self._addresses[index]

    def replace(self, index: int) -> None:
        """See :class:`.Hiring`."""
        self._processes[index].kill()
        self._processes[index].wait()

    def stop(self) -> None:
        """See :class:`.Hiring`."""
        for process in self._processes.values():
            process.kill()
            process.communicate()

    def _start(self, index: int) -> None:
        self._addresses.pop(index, None)
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None, "it is a pipe"
        process.stdin.write(self._specs[index].to_json() + "\n")
        process.stdin.flush()
        self._processes[index] = process
