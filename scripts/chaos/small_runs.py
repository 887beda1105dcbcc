"""What the chaos scripts share: a tiny run, and launches that always end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
VICTIM = Path(__file__).parent / "victim.py"
PARALLEL = 3
"""Launches at a time: most of their time they wait."""

CONFIG: dict[str, Any] = {
    "seed": 3,
    "model": {
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_positions": 64,
        "moe": {
            "num_experts": 4,
            "d_expert": 16,
            "router": {"kind": "topk", "k": 2, "jitter": 0.1},
        },
    },
    "train": {
        "steps": 6,
        "sequence_length": 32,
        "batch_sequences": 8,
        "log_every": 1,
        "eval_every": 3,
        "eval_sequences": 8,
    },
    "optimizer": {"lr": 0.003, "warmup_steps": 2},
    "checkpoint": {"every": 2, "keep": 3},
}
TEXT = "".join(f"def function_{n}(a):\n    return [a * {n}, {n % 7}]\n" for n in range(400))


@dataclass(frozen=True)
class Ended:
    """A launch that is over."""

    status: int | None
    """Exit status; None where it had to be killed at the limit."""
    seconds: float
    log: str

    @property
    def sentences(self) -> list[str]:
        """The errors that it printed itself."""
        return re.findall(r"^error: (.*)$", self.log, re.MULTILINE)

    @property
    def has_traceback(self) -> bool:
        """Whether a worker printed a traceback; torchrun's own names only its files."""
        traces = re.split(r"^(?:\[rank\d\]: )?Traceback", self.log, flags=re.MULTILINE)[1:]
        return any(
            "moeyard/training" in trace.split("Error:")[0] or "trainer.py" in trace
            for trace in traces
        )


def work_folder() -> Path:
    """Return a new folder with a text and a configuration ``run.yaml``."""
    folder = Path(tempfile.mkdtemp(prefix="moeyard-chaos-"))
    (folder / "text.txt").write_text(TEXT)
    values = {
        **CONFIG,
        "run_dir": str(folder / "unset"),
        "data": {"source": str(folder / "text.txt")},
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a launch with one compute thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def torchrun(
    ranks: int, *arguments: object, program: Iterable[str] = ("-m", "moeyard.training")
) -> list[str]:
    """Return the command of a launch on this host."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *program]
    return [*command, *map(str, arguments)]


def launch(
    command: list[str], log: Path, limit_s: float = 240, cwd: str = "/", **extra: str
) -> Ended:
    """Run a command in a separate session to its end; kill all of it at the limit."""
    started = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            env=environment(**extra),
            cwd=cwd,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        status: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        status = None
    seconds = time.monotonic() - started
    end_tree(process)
    return Ended(status, seconds, log.read_text(errors="replace"))


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a session that was started here."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def is_alive(pid: int) -> bool:
    """Say whether a process runs or is stopped."""
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def in_parallel(
    work: Callable[[Any], Any], cases: Iterable[Any], at_once: int = PARALLEL
) -> Iterator[Any]:
    """Run cases a few at a time and yield what they gave, in order."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(work, cases)
