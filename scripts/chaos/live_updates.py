"""A run that publishes is killed again and again, and what it published is damaged.

    python scripts/chaos/live_updates.py [--kills 100] [--seed 1]

Each round a run trains and publishes every step until kill -9, at a random moment. It resumes in
the next round. Two servers follow it, one with all experts in memory and one with half of them; in
every second round they look and answer all the time. In two of three rounds a version that no
server has yet is then damaged: a bit, a cut, a missing file. Right is: after each round both
servers have the weights of one whole version, bit for bit, by hashes that the run wrote apart from
the updates; they never go back; and what a round published without damage they have.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import xxhash
import yaml

from moeyard.cli import main as moeyard
from moeyard.moe.updates.folder import UpdatesFolder
from moeyard.moe.updates.manifest import UpdateError
from moeyard.training import publisher
from moeyard.training.__main__ import main as train

from bounded import scratch
from live_runs import Receiver
from small_runs import CONFIG, TEXT
from verdict import Verdict

LIMIT_S = 120
"""For a run to publish its first version of a round."""
MOMENTS_S = 0.4
"""A kill comes within so many seconds after that, or within a hundredth of it after an update's
hidden folder has appeared."""
DAMAGES = ("bit", "cut", "empty", "no manifest", "no weights", "bit in the manifest")


def run_for_ever(config: str, states: str) -> None:
    """Train and publish until killed. First writes the hash of each unit of the whole model."""
    units_of = publisher.Publisher._units

    def units(self: Any, is_full: bool, stored: Any) -> Any:
        every = {_name(unit.key): f"{unit.digest():016x}" for unit in units_of(self, True, stored)}
        version = max([self._last, *self._folder.versions()]) + 1
        (Path(states) / f"{version}.json").write_text(json.dumps(every))
        return units_of(self, is_full, stored)

    publisher.Publisher._units = units  # type: ignore[method-assign]
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    train([config])


def weights(receiver: Receiver) -> dict[str, str]:
    """Return the hash of each unit that a server has."""
    found = {}
    for key, tensors in receiver.weights().items():
        state = xxhash.xxh3_64()
        for tensor in tensors:
            state.update(tensor.contiguous().numpy().tobytes())
        found[_name(key)] = state.hexdigest()
    return found


def damage(folder: Path, kind: str, draw: random.Random) -> None:
    """Damage an update."""
    path = folder / ("update.json" if "manifest" in kind else "model.safetensors")
    if kind in ("no manifest", "no weights"):
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: draw.randrange(1, len(data))]
    elif kind == "empty":
        data.clear()
    else:
        inked = [place for place, byte in enumerate(data) if not chr(byte).isspace()]
        data[draw.choice(inked)] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


class Rounds:
    """The servers, the run and what became of them."""

    def __init__(self, space: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.updates = UpdatesFolder(space / "updates")
        self.states = space / "states"
        self.states.mkdir()
        self.counts: Counter[str] = Counter()
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["__main__", "moeyard.training.publisher"])
        self._config = _write_config(space, self.updates.path)
        train([str(self._config), "train.steps=1"])
        moeyard(["export", str(space / "run"), str(space / "model")])
        shutil.rmtree(self.updates.path)
        self.receivers = {
            "in memory": Receiver(space / "model", self.updates),
            "half": Receiver(space / "model", self.updates, "50%"),
        }
        self.seen = dict.fromkeys(self.receivers, 0)
        self._damaged: set[int] = set()

    def one(self, number: int) -> list[str]:
        """Run one round; return what is wrong."""
        before, stop = max(self.updates.versions(), default=0), threading.Event()
        threads = [
            threading.Thread(target=self._serve, args=(receiver, stop))
            for receiver in self.receivers.values()
            if number % 2
        ]
        for thread in threads:
            thread.start()
        self._publish_and_kill(before)
        stop.set()
        for thread in threads:
            thread.join()
        self.counts["killed while writing"] += self._is_writing()
        damaged = self._damage()
        for receiver in self.receivers.values():
            receiver.follower.look()
        found = (self._faults(name, before, damaged) for name in self.receivers)
        return [fault for faults in found for fault in faults]

    def _publish_and_kill(self, before: int) -> None:
        run = self._processes.Process(
            target=run_for_ever, args=(str(self._config), str(self.states)), daemon=True
        )
        run.start()
        deadline = time.monotonic() + LIMIT_S
        in_writing, first = self.draw.random() < 2 / 3, self.draw.random() < 1 / 3
        while not (first and in_writing) and max(self.updates.versions(), default=0) == before:
            assert run.is_alive() and time.monotonic() < deadline, "the run publishes nothing"
            time.sleep(0.002)
        if in_writing:
            while not self._is_writing():
                assert run.is_alive() and time.monotonic() < deadline, "the run publishes nothing"
            time.sleep(self.draw.uniform(0, MOMENTS_S / 100))
        else:
            time.sleep(self.draw.uniform(0, MOMENTS_S))
        run.kill()
        run.join()
        self.counts["versions"] = max(self.updates.versions(), default=0)

    def _is_writing(self) -> bool:
        """Say whether the hidden folder of an unfinished update is there."""
        return any(self.updates.path.glob(".version-*.tmp"))

    def _serve(self, receiver: Receiver, stop: threading.Event) -> None:
        while not stop.is_set():
            receiver.follower.look()
            receiver.say([self.draw.randrange(256) for _ in range(20)], 4)

    def _damage(self) -> int | None:
        """Damage a version that no server has, in two of three rounds; return which."""
        newest = max(self.seen_now().values())
        there = set(self.updates.versions()) - self._damaged
        later = sorted(version for version in there if version > newest)
        if not later or self.draw.random() < 1 / 3:
            return None
        version, kind = self.draw.choice(later), self.draw.choice(DAMAGES)
        damage(self.updates.of(version), kind, self.draw)
        self.counts[kind] += 1
        self._damaged.add(version)
        return version

    def seen_now(self) -> dict[str, int]:
        """Return the version of each server."""
        return {name: receiver.version for name, receiver in self.receivers.items()}

    def _faults(self, name: str, before: int, damaged: int | None) -> list[str]:
        receiver, faults = self.receivers[name], []
        version = receiver.version
        if version < self.seen[name]:
            faults.append(f"{name} went back from {self.seen[name]} to {version}")
        self.counts[f"taken, {name}"] += version > self.seen[name]
        self.seen[name] = version
        if version:
            expected = json.loads((self.states / f"{version}.json").read_text())
            if weights(receiver) != expected:
                faults.append(f"{name} has other weights than version {version}")
        newest = max(self.updates.versions(), default=0)
        if damaged is None and newest > before and version != newest:
            faults.append(f"{name} has version {version} of {newest} without damage")
        if damaged is not None and version == damaged and not self._is_harmless(damaged):
            faults.append(f"{name} has taken the damaged version {damaged}")
        return faults

    def _is_harmless(self, version: int) -> bool:
        """Say whether a damaged manifest still says the same: JSON has several spellings."""
        try:
            self.updates.manifest(version)
        except UpdateError:
            return False
        return True


def _write_config(space: Path, updates: Path) -> Path:
    (space / "text.txt").write_text(TEXT)
    values = CONFIG | {
        "run_dir": str(space / "run"),
        "data": {"source": str(space / "text.txt"), "tokenizer": "bytes"},
        "train": CONFIG["train"] | {"steps": 1_000_000, "eval_every": 0},
        "checkpoint": {"every": 2, "keep": 2},
        "publish": {"folder": str(updates), "every": 1, "full_every": 6, "keep": 2},
    }
    path = space / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _name(key: object) -> str:
    return str(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    verdict = Verdict()
    with scratch() as space:
        rounds = Rounds(space, options.seed)
        for number in range(options.kills):
            faults = rounds.one(number)
            here = ", ".join(f"{name} {v}" for name, v in rounds.seen.items())
            verdict.check(f"kill {number + 1}", not faults, "; ".join([here, *faults]))
        for what, count in sorted(rounds.counts.items()):
            verdict.say(f"{what:24} {count}")
    verdict.end()


if __name__ == "__main__":
    main()
