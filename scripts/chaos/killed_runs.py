"""Reliability, row 1: a run killed at random moments and inside saves ends as the unbroken one.

    python scripts/chaos/killed_runs.py [--kills 12] [--seed 11]

kill -9 of rank 0, rank 1 and torchrun in turn, every second time inside a save. Right is: weights,
moments, generators and position equal to those of the run that no one broke, by their hash.
"""

import argparse
import shutil
import sys
from pathlib import Path

from small_runs import ROOT, work_folder
from verdict import Verdict

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "training")]

from kills import Launch, digest, kill_at_random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=11)
    chosen = parser.parse_args()
    verdict, folder = Verdict(), work_folder()
    print(f"seed {chosen.seed}")
    config = Path(folder / "run.yaml")
    unbroken = Launch(config, folder / "unbroken")
    unbroken.start()
    assert unbroken.wait() == 0, unbroken.log()
    broken = Launch(config, folder / "broken")
    broken.start()
    hit = kill_at_random(broken, chosen.kills, chosen.seed)
    status = broken.wait()
    found, wanted = digest(broken.run_dir), digest(unbroken.run_dir)
    verdict.check(
        f"{chosen.kills} kills", status == 0, f"exit {status}, {hit}, {broken.starts()} starts"
    )
    verdict.check("inside saves", hit["inside a save"] > 0, hit["inside a save"])
    verdict.check("digest", found == wanted, f"{found[:16]} and {wanted[:16]}")
    left = [path.name for path in (broken.run_dir / "checkpoints").iterdir() if path.name[0] == "."]
    verdict.check("nothing half written is left", not left, left)
    shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
