"""Reliability, row 3: a rank that stops, dies, hangs or holds Python's lock is named, at any place.

    python scripts/chaos/stopped_ranks.py [--engines ...] [--harms ...] [--places ...]

Each case is a launch of two ranks in which one comes to grief (victim.py). Right is: a sentence
that names the rank within ``parallel.timeout_s`` + 10 s, all processes gone 45 s after that, a
failing exit status, and no traceback of a worker. Held locks below the limit must do no harm.
"""

import argparse
import itertools
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from small_runs import (
    VICTIM,
    Ended,
    end_tree,
    environment,
    in_parallel,
    is_alive,
    torchrun,
    work_folder,
)
from verdict import Verdict

TIMEOUT_S = 8
SENTENCE_S = TIMEOUT_S + 10
GONE_S = 45
LIMIT_S = 240
TRIES = 3
AT_ONCE = 6
"""They wait for their limits and torchrun's 30 s."""
ENGINES = {
    "ddp": [],
    "ep": ["parallel.ep=2"],
    "fsdp": ["parallel.dense=fsdp"],
    "async": ["checkpoint.asynchronous=true"],
}
PLACES = ("start", "joined", "data", "step", "write", "commit", "evaluate", "leave")
HARMS = ("stop", "kill", "sleep", "lock", "error")


@dataclass(frozen=True)
class Case:
    engine: str
    rank: int
    place: str
    harm: str

    @property
    def name(self) -> str:
        return f"{self.engine} rank {self.rank} {self.harm} at {self.place}"


@dataclass(frozen=True)
class Outcome:
    case: Case
    status: int | None
    sentence: str | None
    sentence_s: float
    gone_s: float
    log: str


def wait_for(pattern: str, log: Path, process: subprocess.Popen, limit_s: float) -> re.Match | None:
    """Return the first match in a growing log, None where the process ends or time is up first."""
    deadline = time.monotonic() + limit_s
    while True:
        has_ended = process.poll() is not None
        found = re.search(pattern, log.read_text(errors="replace"), re.MULTILINE)
        if found or has_ended or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def run(case: Case, folder: Path, place: Path) -> Outcome:
    run_dir = place / case.name.replace(" ", "-")
    run_dir.mkdir()
    log = run_dir / "log.txt"
    options = [f"run_dir={run_dir}", f"parallel.timeout_s={TIMEOUT_S}", *ENGINES[case.engine]]
    command = torchrun(2, folder / "run.yaml", *options, program=[str(VICTIM)])
    lock_s = TIMEOUT_S - 4
    env = environment(CHAOS=f"{case.rank} {case.place} {case.harm}", CHAOS_LOCK_S=str(lock_s))
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=env, cwd="/", stdout=file, stderr=file, start_new_session=True
        )
    harmed = wait_for(r"event=harm .* pid=(\d+)", log, process, LIMIT_S)
    started = time.monotonic()
    said = wait_for(r"^error: (.*)$", log, process, LIMIT_S)
    sentence_s = time.monotonic() - started
    try:
        status: int | None = process.wait(LIMIT_S)
        while harmed and is_alive(int(harmed[1])) and time.monotonic() - started < LIMIT_S:
            time.sleep(0.05)
    except subprocess.TimeoutExpired:
        status = None
    gone_s = time.monotonic() - started
    end_tree(process)
    text = log.read_text(errors="replace")
    return Outcome(case, status, said and said[1], sentence_s, gone_s, text)


def run_until_harmed(case: Case, folder: Path) -> Outcome:
    """Try again where a busy machine started one rank so late that the other gave up on it."""
    for turn in range(TRIES):
        place = folder / str(turn)
        place.mkdir(exist_ok=True)
        outcome = run(case, folder, place)
        if "event=harm" in outcome.log:
            break
    return outcome


def judge(verdict: Verdict, outcome: Outcome) -> None:
    case = outcome.case
    ended = Ended(outcome.status, outcome.gone_s, outcome.log)
    if case.harm == "lock":
        verdict.check(
            case.name,
            outcome.status == 0,
            f"exit {outcome.status}; {outcome.sentence or 'no sentence'}",
        )
        return
    problems = []
    if "event=harm" not in outcome.log:
        problems.append("came to no grief")
    if outcome.status in (0, None):
        problems.append(f"exit {outcome.status}")
    if outcome.sentence is None or not re.search(rf"rank {case.rank}\b", outcome.sentence):
        problems.append("not named")
    if outcome.sentence_s > SENTENCE_S:
        problems.append("sentence too late")
    if outcome.gone_s > SENTENCE_S + GONE_S:
        problems.append("processes left too long")
    if ended.has_traceback and case.harm != "error":
        problems.append("a worker's traceback")
    facts = f"{outcome.sentence_s:4.1f} s, gone {outcome.gone_s:4.1f} s: {outcome.sentence}"
    verdict.check(case.name, not problems, " ".join([*problems, facts]))
    if problems:
        print(outcome.log[-3000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--harms", nargs="+", default=["stop"])
    parser.add_argument("--places", nargs="+", default=list(PLACES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 1])
    chosen = parser.parse_args()
    verdict, folder = Verdict(), work_folder()
    cases = [
        Case(*parts)
        for parts in itertools.product(chosen.engines, chosen.ranks, chosen.places, chosen.harms)
        if not (parts[1] == 1 and parts[2] == "commit")  # rank 0 does that alone
    ]
    for outcome in in_parallel(lambda case: run_until_harmed(case, folder), cases, AT_ONCE):
        judge(verdict, outcome)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
