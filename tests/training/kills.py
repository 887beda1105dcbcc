"""Run torchrun, kill parts of it, start it again, and say what came out."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moeyard.parallel.mesh import Mesh
from moeyard.training.checkpoints.checkpoint import Checkpoints, StoredTensors
from moeyard.training.checkpoints.files import read_state

from launch import environment

OVERRIDES = [
    "model.moe.router.jitter=0.1",  # draws from the generator, whose state must survive
    "train.steps=80",
    "train.batch_sequences=32",
    "train.sequence_length=64",
    "train.log_every=1",
    "checkpoint.every=5",
    "parallel.ep=2",
    "parallel.timeout_s=60",
]
DEADLINE_S = 240


def digest(run_dir: Path) -> str:
    """Hash weights, moments, generators and position of the newest checkpoint."""
    newest = Checkpoints(run_dir, Mesh(), 1).newest_whole()
    assert newest is not None, f"{run_dir} has no checkpoint"
    found = hashlib.sha256(str(read_state(newest)["step"]).encode())
    for key, tensor in sorted(StoredTensors(newest).items()):
        found.update(key.encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass
class Launch:
    """A torchrun that may die."""

    config: Path
    run_dir: Path
    program: list[str] = field(default_factory=lambda: ["-m", "moeyard.training"])
    overrides: list[str] = field(default_factory=list)

    def start(self) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--max-restarts", "50", *self.program]
        command += [str(self.config), *OVERRIDES, *self.overrides, f"run_dir={self.run_dir}"]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "log.txt").open("a") as log:
            self.agent = subprocess.Popen(
                command, env=environment(), cwd="/", stdout=log, stderr=log
            )

    def log(self) -> str:
        return (self.run_dir / "log.txt").read_text()

    def workers(self) -> dict[int, int]:
        """Return rank -> process id of the workers that run now."""
        found = {}
        try:
            children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text()
        except OSError:
            return {}
        for pid in children.split():
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [v for v in variables if v.startswith(b"RANK=")]
            if ranks:
                found[int(ranks[0].removeprefix(b"RANK="))] = int(pid)
        return found

    def starts(self) -> int:
        """How often training has started or resumed."""
        log = self.log()
        return log.count("event=started") + log.count("event=resumed")

    def wait(self) -> int:
        return self.agent.wait(timeout=DEADLINE_S)


def wait_until(condition, what: str, timeout: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.001)


def is_alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def kill_at_random(
    launch: Launch, count: int, seed: int, all_dead: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Kill ``count`` times: workers and the agent, at random moments and inside saves.

    Returns how many kills hit what. Every kill waits until training runs again. ``all_dead`` is
    called after each kill that ended all processes.
    """
    chance = random.Random(seed)
    hit = {"rank 0": 0, "rank 1": 0, "agent": 0, "inside a save": 0}
    checkpoints = launch.run_dir / "checkpoints"
    starts, saved, killed = 0, "", 0.0
    for number in range(count):
        wait_until(lambda seen=starts: launch.starts() > seen or finished(launch), "training")
        assert not finished(launch), f"the run ended after {number} of {count} kills"
        starts = launch.starts()
        if number % 2 == 0:
            wait_until(lambda since=killed: is_saving(checkpoints, since), "a save")
            time.sleep(chance.uniform(0, 0.03))
        else:  # so that even a slow run comes further
            wait_until(lambda seen=saved: latest(launch.run_dir) != seen, "a checkpoint")
            time.sleep(chance.uniform(0, 1.0))
        saved = latest(launch.run_dir)
        inside = is_saving(checkpoints, killed)
        victim = ("rank 0", "rank 1", "agent")[number % 3]
        workers = launch.workers()
        if victim == "agent" or len(workers) < 2:
            victim = "agent"
            os.kill(launch.agent.pid, signal.SIGKILL)
            launch.wait()
            killed = time.time()
            wait_until(lambda w=workers: not any(map(is_alive, w.values())), "orphans to die", 5)
            all_dead()
            launch.start()
        else:
            os.kill(workers[int(victim[-1])], signal.SIGKILL)
            killed = time.time()
        hit[victim] += 1
        hit["inside a save"] += inside
    return hit


def is_saving(checkpoints: Path, since: float) -> bool:
    """Say whether a checkpoint is being written, and not left over from before a kill."""
    for path in checkpoints.glob(".tmp-*"):
        try:
            return path.stat().st_mtime > since
        except FileNotFoundError:  # it is whole now
            continue
    return False


def latest(run_dir: Path) -> str:
    """Return the name of the newest checkpoint, or nothing."""
    path = run_dir / "latest"
    return path.read_text().strip() if path.exists() else ""


def finished(launch: Launch) -> bool:
    return launch.agent.poll() is not None
