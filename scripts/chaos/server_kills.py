"""What happens when one of the server's processes is killed under load?

    python scripts/chaos/server_kills.py

Two replicas and eight clients that never stop asking (benchmarks/serve_resilience.py: whole answers
with one retry, streams without). Each replica, the hub, the controller and the HTTP proxy are
killed with SIGKILL one after the other: no whole answer may be lost and no stream end without an
event that says why, but for the proxy's own connections, and everything must be back in time. Then
what cannot be replaced is killed, with a server each: the command must end, say so in one sentence
where it can, and leave no process behind.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from verdict import Verdict
from with_server import Load, Running, ask, processes, read, served, wait_for

SEED = 5
BACK_S = 120.0
QUIET_S = 4.0
ENDS_S = 15.0


def answers(base: str) -> bool:
    try:
        return read(base, "/health")[0] == 200 and bool(ask(base, 10)["usage"])
    except OSError:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def replaceable(verdict: Verdict) -> None:
    """Kill what Ray starts again, under load."""
    names = ["ray::ServeReplica", "ray::ServeReplica", "ray::HubActor", "ray::ServeController"]
    order = random.Random(SEED)
    order.shuffle(names)
    verdict.say(f"seed {SEED}: {', '.join(names)}, ray::ProxyActor")
    with served("--replicas", "2") as running:
        load = Load(running.base, "long")
        try:
            time.sleep(QUIET_S)
            for number, name in enumerate([*names, "ray::ProxyActor"]):
                load.phase = phase = f"{number + 1} {name}"
                before = processes(running)[name]
                victim = order.choice(before)
                kill(victim)

                def is_back(name=name, before=before, victim=victim) -> bool:
                    now = processes(running)[name]
                    return len(now) == len(before) and victim not in now and answers(running.base)

                took = wait_for(is_back, BACK_S)
                verdict.check(f"{phase} is replaced", took is not None, f"{took or BACK_S:.1f} s")
                time.sleep(QUIET_S)
            load.phase = "after"
            time.sleep(QUIET_S)
        finally:
            load.stop()
        for (phase, kind, outcome), count in sorted(load.outcomes.items()):
            verdict.say(f"     {phase:<28}{kind:<8}{outcome:<28}{count:>6}")
        for problem in load.problems[:20]:
            verdict.say(f"     {problem[:160]}")
        bad = {
            key: count
            for key, count in load.outcomes.items()
            if key[2] in ("lost", "cut silently") and "Proxy" not in key[0]
        }
        verdict.check("nothing lost or cut in silence, the proxy's kill aside", not bad, bad or "")


def is_gone(pids: list[int]) -> bool:
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
                return False
        except OSError:
            continue
    return True


def victim_of(running: Running, name: str) -> int:
    """Return a process of ours: the command, its guardian, the one that runs Ray, or Ray's."""
    family = sorted(processes(running)["moeyard"])
    ours = dict(zip(("command", "guardian", "work"), family, strict=True))
    return ours[name] if name in ours else processes(running)[name][0]


def final(verdict: Verdict, name: str) -> None:
    """Kill what cannot be replaced and see that everything ends."""
    with served() as running:
        members = [int(pid) for pid in running.members()]
        kill(victim_of(running, name))
        status = wait_for(lambda: running.process.poll() is not None, ENDS_S)
        took = wait_for(lambda: is_gone(members), ENDS_S)
        left = [pid for pid in members if not is_gone([pid])]
        ended = "still there" if took is None else f"{status or 0:.1f} + {took:.1f} s"
        verdict.check(f"kill -9 of {name}: {len(members)} processes gone", not left, ended)
        said = [line for line in running.log().splitlines() if line.startswith("error: ")]
        if name != "command":
            is_right = len(said) == 1 and running.process.returncode == 1
            verdict.check(f"kill -9 of {name}: one sentence", is_right, said or running.log())
        verdict.check(f"kill -9 of {name}: no traceback", "Traceback" not in running.log())


def main() -> None:
    verdict = Verdict()
    replaceable(verdict)
    for name in ("gcs_server", "raylet", "command", "guardian", "work"):
        final(verdict, name)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
