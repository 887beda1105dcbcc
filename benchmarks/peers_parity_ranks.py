"""The driver's side of the protocol of peers_parity_case.py: start ranks, ask, end them."""

import contextlib
import json
import os
import selectors
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from peers_parity_case import MARK

from moeyard.errors import MoeyardError

HERE = Path(__file__).parent
ENDS_S = 20.0


class Ranks:
    """The processes of one system, which wait for commands."""

    def __init__(self, name: str, command: Sequence[str], num_ranks: int) -> None:
        self.name = name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._errors: list[IO[bytes]] = []
        self._processes = []
        for rank in range(num_ranks):
            errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when a rank has failed
            self._errors.append(errors)
            self._processes.append(
                subprocess.Popen(
                    list(command),
                    env=_environment(command[0], rank, num_ranks, port),
                    cwd=HERE,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=errors,
                )
            )
        self._pending = b""

    def ask(self, timeout_s: float, **command: Any) -> dict[str, Any]:
        """Give every rank a command and return rank 0's answer."""
        line = (json.dumps(command) + "\n").encode()
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer(time.monotonic() + timeout_s)

    def _answer(self, deadline: float) -> dict[str, Any]:
        out = self._processes[0].stdout
        assert out is not None
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                line, found, rest = self._pending.partition(b"\n")
                if found:
                    self._pending = rest
                    if line.startswith(MARK.encode()):
                        return dict(json.loads(line[len(MARK) :]))
                    continue
                if selector.select(timeout=0.2):
                    data = os.read(out.fileno(), 65536)
                    if not data:
                        raise self._failure()
                    self._pending += data
                elif any(process.poll() for process in self._processes):
                    raise self._failure()
        raise MoeyardError(f"{self.name} did not answer in time; raise --timeout.")

    def _failure(self) -> MoeyardError:
        """Return the last lines of the first rank that failed."""
        time.sleep(1.0)
        failed = [n for n, process in enumerate(self._processes) if process.poll()]
        rank = failed[0] if failed else 0
        self._errors[rank].seek(0)
        words = self._errors[rank].read().decode(errors="replace").strip().splitlines()
        if os.environ.get("PEERS_PARITY_DEBUG"):
            print("\n".join(words[-40:]))
        lines = [line for line in words if "Error" in line] or words or ["it said nothing"]
        return MoeyardError(f"{self.name}, rank {rank}: {lines[-1][:200]}")

    def close(self) -> None:
        """End the ranks: they stop when their input ends."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + ENDS_S
        for process in self._processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for errors in self._errors:
            errors.close()


def _environment(python: str, rank: int, num_ranks: int, port: int) -> dict[str, str]:
    python_path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": python_path.rstrip(os.pathsep),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # What a system compiles at its first start: systems must not wait for each other's.
        "TORCH_EXTENSIONS_DIR": str(Path(python).parent.parent / "torch_extensions"),
    }
