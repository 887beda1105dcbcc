"""Reliability: a run that has finished ends with exit status 0, every time, under load.

    python scripts/chaos/finished_runs.py [--runs 50] [--seed 0]

Short runs with 64 and 256 experts and EP 2 and 4, whose last save is quick for rank 0, so that it
could leave with the store while others still ask it. Three run at a time, which is a load of 6 to
12 processes. Right is: exit status 0, the last checkpoint whole, no traceback.
"""

import argparse
import itertools
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from moeyard.training.checkpoints.files import verify

from small_runs import Ended, in_parallel, launch, torchrun, work_folder
from verdict import Verdict

KINDS = list(itertools.product((64, 256), (2, 4)))
FIXED = ["train.eval_every=0", "train.batch_sequences=4", "train.eval_sequences=4"]
FIXED += ["checkpoint.every=100"]


@dataclass(frozen=True)
class Run:
    number: int
    experts: int
    ranks: int
    steps: int

    @property
    def name(self) -> str:
        return f"run {self.number}: {self.experts} experts, EP={self.ranks}, {self.steps} steps"


def go(run: Run, folder: Path) -> tuple[Run, Ended, str | None]:
    """Run once; return what is wrong with the last checkpoint, too."""
    run_dir = folder / f"run{run.number}"
    overrides = [f"run_dir={run_dir}", f"parallel.ep={run.ranks}", f"train.steps={run.steps}"]
    overrides += [f"model.moe.num_experts={run.experts}", f"seed={run.number}", *FIXED]
    log = folder / f"log{run.number}.txt"
    ended = launch(torchrun(run.ranks, folder / "run.yaml", *overrides), log)
    last = run_dir / "checkpoints" / f"step-{run.steps:08d}"
    problem = verify(last) if last.exists() else "no last checkpoint"
    shutil.rmtree(run_dir, ignore_errors=True)
    return run, ended, problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    verdict, folder = Verdict(), work_folder()
    print(f"seed {chosen.seed}")
    chance = random.Random(chosen.seed)
    runs = [Run(n, *KINDS[n % len(KINDS)], chance.randint(1, 3)) for n in range(chosen.runs)]
    for run, ended, problem in in_parallel(lambda run: go(run, folder), runs):
        holds = ended.status == 0 and problem is None and "Traceback" not in ended.log
        facts = f"exit {ended.status}, {ended.seconds:.0f} s, {problem or 'checkpoint whole'}"
        verdict.check(run.name, holds, f"{facts}, load {os.getloadavg()[0]:.1f}")
        if not holds:
            print(ended.log[-3000:])
    shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
