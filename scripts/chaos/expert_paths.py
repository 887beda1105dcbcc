"""Does any way of rows to their experts hang, with odd choices or with a lost rank?

    python scripts/chaos/expert_paths.py [--only WORD ...]

Each case is a run of four ranks (path_victim.py). Ranks whose experts get no rows (starved), one
hot expert, and a rank that brings no rows (empty) must do no harm: every rank ends with 0 after all
steps, which have these choices in turn. If rank 1 is killed or stopped in the middle of an
exchange, every other rank must end with a failing status by itself within ``parallel.timeout_s`` +
15 s, with a sentence that names rank 1 and the collective, and leave no process.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from small_runs import environment, in_parallel, work_folder
from verdict import Verdict

VICTIM = Path(__file__).parent / "path_victim.py"
RANKS, LOST = 4, 1
TIMEOUT_S = 15
ENDED_S = TIMEOUT_S + 15
LIMIT_S = 240
AT_ONCE = 2
TRIES = 3
"""A busy machine may start ranks so far apart that the first ones give up."""
COPY_BYTES = 3 * 32 * 16 * 8
NODES = ["parallel.path=hierarchical", "parallel.ranks_per_node=2"]
PATHS = {
    "all_to_all": [],
    "all_gather": ["parallel.path=all_gather"],
    "hierarchical": NODES,
    "chunked 4/2": ["parallel.chunks=4", "parallel.backward_chunks=2"],
    "padded": ["parallel.path=padded", "model.moe.router.capacity={factor: 4}"],
    "slices": ["parallel.ep=2", "parallel.expert_tp=2", "parallel.chunks=2"],
    "copies": ["parallel.copies={when: always}"],
    "copies rematerialized": [
        f"parallel.copies={{when: always, max_bytes: {4 * COPY_BYTES}, rematerialize: true}}"
    ],
}
"""By name, one line each."""
ODD_CHOICES = ("starved", "hot", "empty", "hot and empty")
"""By step."""
GOES_ON = [("odd", "shared"), ("odd", "gloo")]
LOSES = [
    ("kill-forward", "shared"),
    ("kill-backward", "gloo"),
    ("stop-forward", "gloo"),
    ("stop-backward", "shared"),
]
LOSES_COPIES = [("kill-copies", "gloo"), ("stop-copies", "gloo")]
OVERRIDES = [
    "model.num_layers=3",
    "model.moe.num_experts=8",
    "model.moe.router.jitter=0",
    "train.steps=4",
    "parallel.ep=4",
    f"parallel.timeout_s={TIMEOUT_S}",
]


@dataclass(frozen=True)
class Case:
    path: str
    kind: str
    transport: str

    @property
    def name(self) -> str:
        return f"{self.path}, {self.kind}, {self.transport}"

    @property
    def loses(self) -> bool:
        return self.kind.startswith(("kill", "stop"))


@dataclass(frozen=True)
class Outcome:
    case: Case
    statuses: list[int | None]
    """By rank; None where it had to be killed."""
    left: list[int]
    """Ranks whose process had children after its end."""
    seconds: float
    """From the harm, or from the start."""
    log: str


def cases() -> list[Case]:
    found = []
    for path in PATHS:
        kinds = [*GOES_ON, *LOSES, *(LOSES_COPIES if "copies" in path else [])]
        found += [Case(path, *kind) for kind in kinds]
    return found


def run(case: Case, folder: Path, place: Path) -> Outcome:
    """Start the ranks without torchrun, which would end the others, and wait for them."""
    run_dir = place / re.sub(r"\W+", "-", case.name)
    run_dir.mkdir()
    options = [f"run_dir={run_dir}/run", *OVERRIDES, *PATHS[case.path]]
    command = [sys.executable, str(VICTIM), str(folder / "run.yaml"), *options]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = run_dir / "log.txt"
    with log.open("w") as file:
        processes = [
            subprocess.Popen(
                command,
                env=environment(
                    CHAOS=f"{LOST} {case.kind} {case.transport}",
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(RANKS),
                    LOCAL_WORLD_SIZE=str(RANKS),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                    TORCHELASTIC_RUN_ID="chaos",
                ),
                cwd="/",
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            for rank in range(RANKS)
        ]
    started = wait_for_harm(case, log, processes)
    deadline = time.monotonic() + LIMIT_S
    for rank, process in enumerate(processes):
        if not (case.loses and rank == LOST):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
    seconds = time.monotonic() - started
    statuses = [process.poll() for process in processes]
    left = [rank for rank, process in enumerate(processes) if end_session(process)]
    if case.loses and LOST in left:
        left.remove(LOST)  # it is stopped
    return Outcome(case, statuses, left, seconds, log.read_text(errors="replace"))


def run_until_started(case: Case, folder: Path) -> Outcome:
    """Run a case whose ranks find each other."""
    for turn in range(TRIES):
        place = folder / str(turn)
        place.mkdir(exist_ok=True)
        outcome = run(case, folder, place)
        if "did not appear" not in outcome.log:
            break
    return outcome


def wait_for_harm(case: Case, log: Path, processes: list[subprocess.Popen]) -> float:
    """Return when rank 1 came to grief, or now."""
    deadline = time.monotonic() + LIMIT_S
    while case.loses and time.monotonic() < deadline:
        if "event=harm" in log.read_text() or all(p.poll() is not None for p in processes):
            break
        time.sleep(0.05)
    return time.monotonic()


def end_session(process: subprocess.Popen) -> bool:
    """Kill what is left of a rank's session; say whether anything was."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    is_alone = process.poll() is not None and process.returncode >= 0
    process.wait()
    return not is_alone


def judge(verdict: Verdict, outcome: Outcome) -> None:
    case, problems = outcome.case, []
    others = [status for rank, status in enumerate(outcome.statuses) if rank != LOST]
    said = list(dict.fromkeys(re.findall(r"^error: (.*)$", outcome.log, re.MULTILINE)))
    if not case.loses:
        steps = re.findall(r"^step=(\d+)", outcome.log, re.MULTILINE)
        for number, choices in enumerate(ODD_CHOICES, start=1):
            name = f"{case.path}, {choices}, {case.transport}"
            verdict.check(name, str(number) in steps, f"step {number}")
        if outcome.statuses != [0] * RANKS:
            problems.append(f"exit {outcome.statuses}")
        facts = f"exit {outcome.statuses}, {outcome.seconds:.0f} s"
        verdict.check(f"{case.path}, end, {case.transport}", not problems, facts)
    else:
        if "event=harm" not in outcome.log:
            problems.append("came to no grief")
        if any(status is None for status in others):
            problems.append("hangs")
        if any(status is not None and status <= 0 for status in others):
            problems.append("exit")
        if not any(re.search(rf"rank {LOST}\b", sentence) for sentence in said):
            problems.append("not named")
        if not any(" waited in the " in sentence for sentence in said):
            problems.append("no collective")
        if outcome.seconds > ENDED_S:
            problems.append("too late")
        facts = f"{outcome.seconds:4.1f} s, exit {others}: {' / '.join(said)}"
        facts = facts.replace(socket.gethostname(), "HOST")
        verdict.check(case.name, not problems, " ".join([*problems, facts]))
    if outcome.left:
        verdict.check(f"{case.name}: processes", False, f"left by ranks {outcome.left}")
    if problems:
        print(outcome.log[-3000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of cases")
    chosen = parser.parse_args()
    verdict, folder = Verdict(), work_folder()
    wanted = [case for case in cases() if any(part in case.name for part in chosen.only)]
    for outcome in in_parallel(lambda case: run_until_started(case, folder), wanted, AT_ONCE):
        judge(verdict, outcome)
    shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
