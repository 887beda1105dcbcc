"""Reliability, rows 1 and 7: a run killed during asynchronous saves ends as one without them.

    python scripts/chaos/async_saves.py [--kills 20] [--seed 7]

kill -9 of rank 0, rank 1 and torchrun with all ranks in turn, every second time while a checkpoint
is written and otherwise at random. Right is: weights, moments, generators and position equal, by
their hash, to those of an unbroken run that saves while training waits; and after each kill of all
ranks ``latest`` names a whole checkpoint.
"""

import argparse
import shutil
import sys
from pathlib import Path

from moeyard.training.checkpoints.files import verify

from small_runs import ROOT, work_folder
from verdict import Verdict

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "training")]

from kills import Launch, digest, kill_at_random

LARGER = ["model.d_model=128", "model.moe.num_experts=8", "model.moe.d_expert=512"]
"""40 MB of weights and moments, whose writing takes some steps."""
LONGER = ["train.steps=200", "train.eval_sequences=8", "train.eval_every=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args()
    verdict, folder = Verdict(), work_folder()
    print(f"seed {chosen.seed}")
    config = Path(folder / "run.yaml")
    unbroken = Launch(config, folder / "unbroken", overrides=[*LARGER, *LONGER])
    unbroken.start()
    assert unbroken.wait() == 0, unbroken.log()
    asynchronous = [*LARGER, *LONGER, "checkpoint.asynchronous=true"]
    broken = Launch(config, folder / "broken", overrides=asynchronous)
    problems: list[str | None] = []

    def look() -> None:
        latest = broken.run_dir / "latest"
        if latest.exists():
            problems.append(verify(broken.run_dir / "checkpoints" / latest.read_text().strip()))

    broken.start()
    hit = kill_at_random(broken, chosen.kills, chosen.seed, look)
    status = broken.wait()
    found, wanted = digest(broken.run_dir), digest(unbroken.run_dir)
    verdict.check(
        f"{chosen.kills} kills", status == 0, f"exit {status}, {hit}, {broken.starts()} starts"
    )
    verdict.check("inside saves", hit["inside a save"] > 0, hit["inside a save"])
    verdict.check("latest is whole", not any(problems), f"looked {len(problems)} times")
    verdict.check("digest", found == wanted, f"{found[:16]} and {wanted[:16]}")
    left = [path.name for path in (broken.run_dir / "checkpoints").iterdir() if path.name[0] == "."]
    verdict.check("nothing half written is left", not left, left)
    if not verdict.num_faults:
        shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
