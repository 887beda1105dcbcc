"""Reliability, row 6: a full disk costs a checkpoint and never a run's past, and has its name.

    python scripts/chaos/full_disks.py [--limits 16] [--seed 0]

Runs on file systems in memory of several sizes, which need the right to mount, and with the largest
file limited (RLIMIT_FSIZE). Right is: no traceback; a message that says "no space left" or "file
too large"; training goes on after a failed save, until three in a row or the last one; ``latest``
names the newest whole checkpoint; and with room again the run ends as the unbroken one.
"""

import argparse
import hashlib
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from moeyard.parallel.mesh import Mesh
from moeyard.training.checkpoints.checkpoint import Checkpoints, StoredTensors
from moeyard.training.checkpoints.files import read_state, verify

from small_runs import Ended, in_parallel, launch, work_folder
from verdict import Verdict

SIZES_KIB = (150, 250, 350, 500, 650, 800, 1000, 1300, 1600, 2000)
STEPS = ["train.steps=12", "train.eval_every=0"]
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from moeyard.training.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Case:
    name: str
    size_kib: int | None = None
    limit: int | None = None


def digest(run_dir: Path) -> str:
    """Hash weights, moments, generators and position of the newest checkpoint."""
    newest = Checkpoints(run_dir, Mesh(), 1).newest_whole()
    assert newest is not None
    found = hashlib.sha256(str(read_state(newest)["step"]).encode())
    for key, tensor in sorted(StoredTensors(newest).items()):
        found.update(key.encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def problems_of(ended: Ended, run_dir: Path) -> list[str]:
    """Return what is wrong with a run that met the end of its disk."""
    problems = []
    if "Traceback" in ended.log:
        problems.append("a traceback")
    failed = ended.log.count("could not be written (")
    named = len(re.findall(r"\((no space left on device|file too large)\)", ended.log))
    if named < failed:
        problems.append("another reason is named")
    if ended.status != 0 and not ended.sentences:
        problems.append("no sentence")
    if ended.status not in (0, 1, 2):
        problems.append(f"exit {ended.status}")
    steps = sorted((run_dir / "checkpoints").glob("step-*")) if run_dir.exists() else []
    if any(verify(step) is not None for step in steps):
        problems.append("a checkpoint that is not whole")
    if steps and (run_dir / "latest").read_text().strip() != steps[-1].name:
        problems.append("latest stays behind")
    return problems


def run(case: Case, folder: Path, unbroken: str) -> tuple[Case, Ended, list[str]]:
    place = folder / case.name.replace(" ", "-")
    place.mkdir()
    module = [sys.executable, "-m", "moeyard.training"]
    arguments = [str(folder / "run.yaml"), f"run_dir={place}/run", *STEPS]
    command = [*module, *arguments]
    if case.size_kib is not None:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={case.size_kib}k", "tmpfs", str(place)]
        subprocess.run(mount, check=True)
    else:
        command = [sys.executable, "-c", LIMITED.format(limit=case.limit), *arguments]
    try:
        ended = launch(command, folder / f"{place.name}.txt")
        problems = problems_of(ended, place / "run")
        if case.size_kib is not None:
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        again = launch([*module, *arguments], folder / f"{place.name}-again.txt")
        if again.status != 0:
            problems.append(f"exit {again.status} with room: {again.log[-500:]}")
        elif digest(place / "run") != unbroken:
            problems.append("another end than the unbroken run's")
    finally:
        if case.size_kib is not None:
            subprocess.run(["umount", "-l", str(place)], check=True)
    return case, ended, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits", type=int, default=16, help="runs with RLIMIT_FSIZE")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    verdict, folder = Verdict(), work_folder()
    print(f"seed {chosen.seed}")
    chance = random.Random(chosen.seed)
    command = [sys.executable, "-m", "moeyard.training", str(folder / "run.yaml")]
    ended = launch([*command, f"run_dir={folder}/unbroken", *STEPS], folder / "unbroken.txt")
    assert ended.status == 0, ended.log
    unbroken = digest(folder / "unbroken")
    cases = [Case(f"disk of {size} KiB", size_kib=size) for size in SIZES_KIB]
    cases += [
        Case(f"files of {limit} bytes", limit=limit)
        for limit in sorted(chance.randint(500, 400_000) for _ in range(chosen.limits))
    ]
    went_on = 0
    for case, ended, problems in in_parallel(lambda case: run(case, folder, unbroken), cases):
        went_on += "Training goes on" in ended.log
        last = ended.sentences[-1] if ended.sentences else "no error"
        passed_over = ended.log.count("Training goes on")
        facts = f"exit {ended.status}, {passed_over} failed saves passed over: {last}"
        facts = re.sub(r"/tmp/\S*/", "", facts)
        verdict.check(case.name, not problems, " ".join([*problems, facts]))
    verdict.check("some runs went on after a failed save", went_on > 0, went_on)
    shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
