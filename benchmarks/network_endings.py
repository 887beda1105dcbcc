"""Is anything of the slow network left, however a benchmark on it ends?

python benchmarks/network_endings.py

A child holds a network of 2 x 2 ranks that sleep, and is ended in every way. Then namespaces,
control groups and processes are counted. Also: what is said where something is not permitted. Needs
root.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moeyard.errors import MoeyardError

import network_ranks
from network_bed import Network
from network_links import PREFIX
from network_ranks import CPU_GROUPS

SLEEP_S = 54_321
"""By this number the ranks' processes are found among all others."""
RANK = f"import time, sys; print('here', flush=True); time.sleep({SLEEP_S})"


def hold(ranks: str) -> None:
    """Hold a network whose ranks sleep, until this process is ended."""
    rank = ["-c", RANK]
    try:
        with Network(ranks=ranks) as network:  # type: ignore[arg-type]
            network.run(rank, timeout_s=SLEEP_S)
    except KeyboardInterrupt:
        sys.exit(130)


def fail_in_a_rank() -> None:
    """Let one rank fail while the others sleep."""
    script = f"import os, sys, time; os.environ['RANK'] == '3' and sys.exit(7); {RANK}"
    with Network() as network:
        network.run(["-c", script], timeout_s=60)


def raise_inside() -> None:
    with Network():
        raise RuntimeError("a mistake in a benchmark")


def take_too_long() -> None:
    with Network() as network:
        network.run(["-c", RANK], timeout_s=3)


def lack_quotas() -> None:
    """Make a network where no control group can be made."""
    groups, network_ranks.CPU_GROUPS = network_ranks.CPU_GROUPS, Path("/sys/fs/cgroup/absent")
    try:
        raise_inside()
    finally:
        network_ranks.CPU_GROUPS = groups


def left() -> dict[str, int]:
    """Count what is left of a network."""
    asleep = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            asleep += str(SLEEP_S).encode() in (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
    return {
        "namespaces": len(list(Path("/run/netns").glob(f"{PREFIX}*"))),
        "groups": len(list(CPU_GROUPS.glob(f"{PREFIX}*"))),
        "processes": asleep,
    }


def start(ranks: str) -> subprocess.Popen:
    """Start the child that holds a network, and return when all its ranks are there."""
    child = subprocess.Popen([sys.executable, __file__, "--hold", ranks], start_new_session=True)
    deadline = time.monotonic() + 60
    while sum(count_members(group) for group in CPU_GROUPS.glob(f"{PREFIX}rank*")) < 4:
        assert time.monotonic() < deadline and child.poll() is None, "the ranks did not start"
        time.sleep(0.1)
    return child


def count_members(group: Path) -> int:
    try:
        return len((group / "cgroup.procs").read_text().split())
    except OSError:
        return 0


def end_by(number: signal.Signals, ranks: str) -> int:
    child = start(ranks)
    os.kill(child.pid, number)
    return child.wait(60)


def end_while_it_is_built() -> str:
    """End children by SIGTERM at moments between their start and a finished network."""
    statuses = []
    for moment in range(12):
        child = subprocess.Popen([sys.executable, __file__, "--hold", "isolated"])
        time.sleep(0.1 + 0.04 * moment)
        child.terminate()
        statuses.append(child.wait(60))
    return f"status {statuses}"


def refused(*enter: str, **env: str) -> str:
    """Start the benchmark where it cannot work; return its status and what it says."""
    command = [*enter, sys.executable, str(Path(__file__).parent / "network.py")]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    return f"status {done.returncode}, {done.stderr.strip()}"


def end_of(action: Callable[[], None]) -> str:
    try:
        action()
    except (MoeyardError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return "no error"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        hold(arguments.hold)
        return 0
    is_clean = True

    def say(what: str, outcome: object) -> None:
        nonlocal is_clean
        found = left()
        is_clean &= not any(found.values())
        print(f"{what:28} {outcome}; left: {found}", flush=True)

    for ranks in ("isolated", "together"):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            say(f"{ranks}, {number.name}", f"status {end_by(number, ranks)}")
        status = end_by(signal.SIGKILL, ranks)
        time.sleep(0.5)
        print(f"{f'{ranks}, SIGKILL':28} status {status}; left: {left()}")
        say("  and then another one", end_of(raise_inside))
    say("SIGTERM while it is built", end_while_it_is_built())
    for action in (raise_inside, fail_in_a_rank, take_too_long, lack_quotas):
        say(action.__name__, end_of(action))
    say("not root", refused("setpriv", "--reuid", "65534", "--clear-groups"))
    say("without tc and ip", refused(PATH="/nonexistent"))
    child = start("isolated")
    print(f"{'a second network meanwhile':28}", end_of(raise_inside))
    child.terminate()
    child.wait(60)
    say("and its end", "status " + str(child.returncode))
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
