"""Reliability, row 8: a weight that is not finite on one rank stops all ranks before the update.

    python scripts/chaos/nan_on_one_rank.py

Right is: exit status 1, one sentence that names the step, the checkpoints from before it whole, and
the same decision on every rank, for each engine.
"""

import shutil
import sys
from pathlib import Path

from moeyard.training.checkpoints.files import verify

from small_runs import VICTIM, Ended, in_parallel, launch, torchrun, work_folder
from verdict import Verdict

ENGINES = {"ddp": [], "ep": ["parallel.ep=2"], "fsdp": ["parallel.dense=fsdp"]}
STEP = 3
"""The victim's turn (victim.py)."""


def run(engine: str, folder: Path) -> tuple[str, Ended]:
    options = [f"run_dir={folder}/{engine}", "train.eval_every=0", *ENGINES[engine]]
    command = torchrun(2, folder / "run.yaml", *options, program=[str(VICTIM)])
    return engine, launch(command, folder / f"{engine}.txt", CHAOS="1 step nan")


def main() -> None:
    verdict, folder = Verdict(), work_folder()
    for engine, ended in in_parallel(lambda engine: run(engine, folder), ENGINES):
        steps = sorted((folder / engine / "checkpoints").glob("step-*"))
        problems = []
        if "event=harm" not in ended.log:
            problems.append("came to no grief")
        if ended.status != 1:
            problems.append(f"exit {ended.status}")
        if len(ended.sentences) != 1 or f"step {STEP} has loss nan" not in ended.sentences[0]:
            problems.append("not said, or not once")
        if [step.name for step in steps] != ["step-00000002"] or verify(steps[0]) is not None:
            problems.append("the checkpoint from before it is not there")
        if ended.has_traceback:
            problems.append("a worker's traceback")
        verdict.check(
            f"{engine}, NaN on rank 1", not problems, " ".join([*problems, *ended.sentences])
        )
        if problems:
            print(ended.log[-3000:])
    shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
