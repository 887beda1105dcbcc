"""Reliability, row 2: a run that is asked to stop saves first, however it is asked.

    python scripts/chaos/signals.py

SIGTERM, SIGINT and SIGHUP to a run of one process and to torchrun with two ranks, a terminal that
is closed, and SIGHUP under nohup, which is no request. Right is: a whole checkpoint of the step
that was under way, exit status 0 of the program (torchrun's own is 1), all processes gone in time.
"""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from moeyard.parallel.mesh import Mesh
from moeyard.training.checkpoints.checkpoint import Checkpoints

from small_runs import end_tree, environment, in_parallel, torchrun, work_folder
from verdict import Verdict

LONG = ["train.steps=100000", "checkpoint.every=100000", "train.eval_every=0"]
GONE_S = 60
STARTED_S = 240


@dataclass(frozen=True)
class Case:
    name: str
    ranks: int
    number: signal.Signals
    how: str = "plain"
    """plain, nohup or terminal."""


CASES = [
    *(Case(f"{n.name}, one process", 1, n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    *(Case(f"{n.name}, torchrun", 2, n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    Case("a closed terminal, one process", 1, signal.SIGHUP, "terminal"),
    Case("a closed terminal, torchrun", 2, signal.SIGHUP, "terminal"),
    Case("SIGHUP under nohup, one process", 1, signal.SIGHUP, "nohup"),
]


def hear_signals() -> None:
    """Undo what this script may have been started with: a shell's ``&``, or nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def has_logged(run_dir: Path, step: int = 1) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= step


def wait_until(condition, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def run(case: Case, folder: Path) -> tuple[Case, list[str], str]:
    """Start, ask, and return what is wrong, with some figures."""
    run_dir = folder / re.sub(r"\W+", "-", case.name)
    arguments = [folder / "run.yaml", f"run_dir={run_dir}", *LONG]
    command = [sys.executable, "-m", "moeyard.training", *map(str, arguments)]
    if case.ranks > 1:
        command = torchrun(case.ranks, *arguments)
    if case.how == "nohup":
        command = ["nohup", *command]
    log = folder / f"{run_dir.name}.txt"
    terminal, end = pty.openpty()
    with log.open("w") as file:
        out = end if case.how == "terminal" else file
        # In a separate session, whose terminal is ours if there is one.
        program = ["setsid", "--ctty", "--wait", *command] if case.how == "terminal" else command
        process = subprocess.Popen(
            program,
            env=environment(),
            cwd="/",
            stdin=out if case.how == "terminal" else None,
            stdout=out,
            stderr=out,
            start_new_session=case.how != "terminal",
            preexec_fn=hear_signals,
        )
    os.close(end)
    problems = []
    if not wait_until(lambda: has_logged(run_dir), STARTED_S):
        problems.append("did not start")
    asked = time.monotonic()
    if case.how == "terminal":
        os.close(terminal)
    else:
        process.send_signal(case.number)
    if case.how == "nohup":
        if not wait_until(lambda: has_logged(run_dir, 30) or process.poll() is not None, STARTED_S):
            problems.append("does not go on")
        if process.poll() is not None:
            problems.append("ended")
        process.send_signal(signal.SIGTERM)
    try:
        status: int | None = process.wait(GONE_S)
    except subprocess.TimeoutExpired:
        status = None
    seconds = time.monotonic() - asked
    end_tree(process)
    if case.how != "terminal":
        os.close(terminal)
    if status is None or (case.ranks == 1 and case.how != "terminal" and status != 0):
        problems.append(f"exit {status}")
    newest = Checkpoints(run_dir, Mesh(), 1).newest_whole()
    if newest is None:
        problems.append("nothing saved")
    if case.how != "terminal" and "event=stopped reason=SIG" not in log.read_text():
        problems.append("not said")
    return case, problems, f"exit {status} after {seconds:.1f} s, {newest and newest.name}"


def main() -> None:
    verdict, folder = Verdict(), work_folder()
    for case, problems, facts in in_parallel(lambda case: run(case, folder), CASES):
        verdict.check(case.name, not problems, " ".join([*problems, facts]))
    shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
