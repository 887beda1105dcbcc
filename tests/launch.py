"""Start the processes that tests talk to."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(**extra: str) -> dict[str, str]:
    """Return an environment for a child with one compute thread and no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def free_port() -> int:
    """Return a port of the loopback that nobody listens at, and that nobody is given by chance.

    Below the ports that Linux hands out (32768 and up) and above those of Ray's workers: one of
    them took such a port before the server that it was meant for.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def torchrun(ranks: int, *arguments: str, timeout: float = 300) -> str:
    """Run ``arguments`` under torchrun and return its output; fail with it otherwise."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *arguments]
    return run(command, timeout)


def moeyard_train(*arguments: str, timeout: float = 300) -> str:
    """Run ``moeyard train`` and return its output; fail with it otherwise."""
    return run([sys.executable, "-m", "moeyard.cli", "train", *arguments], timeout)


def training(*arguments: str, timeout: float = 300) -> str:
    """Run the training program in one process and return its output."""
    return run([sys.executable, "-m", "moeyard.training", *arguments], timeout)


def run(command: list[str], timeout: float, **extra: str) -> str:
    """Run a command, which must succeed, and return what it printed; ``extra`` is environment."""
    done = subprocess.run(
        command,
        env=environment(**extra),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{output[-4000:]}"
    return output
