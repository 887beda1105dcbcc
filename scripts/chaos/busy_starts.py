"""Does the server start on a machine whose cores are all busy?

    python scripts/chaos/busy_starts.py [STARTS]

While several processes for each core compute, ``moeyard serve`` is started again and again. Each
start must end in an answer to a completion, or in one sentence and no traceback, and leave no
process behind after SIGTERM.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from verdict import Verdict
from with_server import ask, served, wait_for

STARTS = 20
BUSY_PER_CORE = 3
START_S = 600.0
STOP_S = 60.0


def one(verdict: Verdict, number: int) -> bool:
    """Start, ask and stop; return whether it answered."""
    started = time.monotonic()
    with served(wait=False) as running:
        wait_for(
            lambda: "ready model=" in running.log() or running.process.poll() is not None, START_S
        )
        took = time.monotonic() - started
        is_ready = "ready model=" in running.log()
        attempts = 1 + running.log().count("starting_again")
        load = os.getloadavg()[0]
        if is_ready:
            is_right = ask(running.base, 120)["usage"]["completion_tokens"] == 4
            what = "answers"
        else:
            said = [line for line in running.log().splitlines() if line.startswith("error: ")]
            is_right = len(said) == 1 and "Traceback" not in running.log()
            what = said[0] if said else running.log()[-300:]
        members = running.members()
        stopping = time.monotonic()
        if running.process.poll() is None:
            running.process.terminate()
            running.process.wait(STOP_S)
        stopped = time.monotonic() - stopping
        left = [pid for pid in members if Path(f"/proc/{pid}").exists()]
        told = (
            f"{what} after {took:.0f} s, attempts {attempts}, load {load:.0f}, stop {stopped:.1f} s"
        )
        verdict.check(f"start {number}", is_right and not left, told)
        return is_ready


def main() -> None:
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else STARTS
    verdict = Verdict()
    cores = len(os.sched_getaffinity(0))
    verdict.say(f"{BUSY_PER_CORE * cores} processes compute on {cores} cores")
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(BUSY_PER_CORE * cores)
    ]
    try:
        ready = sum(one(verdict, number) for number in range(1, starts + 1))
    finally:
        for process in busy:
            process.kill()
    verdict.say(f"{ready} of {starts} answered")
    verdict.end()


if __name__ == "__main__":
    main()
