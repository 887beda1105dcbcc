"""Nothing that guarded work starts outlives it, however the processes end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeyard.serving.cluster import own_ray
from moeyard.serving.cluster.guardian import children
from moeyard.serving.cluster.own_ray import Watch, prepare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guardian is for Linux")

PROGRAM = """
import os, subprocess, sys, time
from moeyard.serving.cluster.guardian import run_guarded
from pathlib import Path
pids = Path(sys.argv[1])

def work(attempt):
    with pids.open("a") as file:
        file.write(f"{os.getppid()} {os.getpid()}")
        # One that a shell leaves behind in a separate session, as daemons do.
        shell = "setsid sleep 1000 >/dev/null & echo $!"
        left = subprocess.run(["sh", "-c", shell], stdout=subprocess.PIPE, text=True).stdout
        file.write(f" {left}")
    %s

sys.exit(run_guarded(work))
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that starts guarded work; it ends with the test."""
    started = []
    pids = tmp_path / "pids"
    pids.touch()

    def start(ending) -> tuple[subprocess.Popen, Path]:
        command = [sys.executable, "-c", PROGRAM % ending, str(pids)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1], pids

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("victim", ["command", "guardian", "work"])
def test_kill_9_of_any_of_the_three_leaves_nothing(start, victim):
    process, path = start("time.sleep(1000)")
    wait_for(lambda: path.read_text().count("\n") == 1)
    guardian, work, orphan = path.read_text().split()
    assert all(map(is_alive, (guardian, work, orphan)))
    target = {"command": str(process.pid), "guardian": guardian, "work": work}[victim]
    os.kill(int(target), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    wait_for(lambda: not any(map(is_alive, (guardian, work, orphan))))
    if victim != "command":
        assert process.returncode == 1
        assert said == (
            "error: the server's process was ended by SIGKILL; everything has stopped.\n"
        )


@pytest.mark.parametrize(
    ("ending", "status", "attempts"),
    [("return 3", 3, 1), ("return 75", 75, 3), ("return 75 if attempt == 1 else 0", 0, 2)],
    ids=["once", "in_vain", "again"],
)
def test_work_is_tried_again_in_a_fresh_process_when_it_asks(start, ending, status, attempts):
    process, path = start(ending)
    assert process.wait(60) == status
    lines = [line.split() for line in path.read_text().splitlines()]
    assert len(lines) == attempts == len({work for _, work, _ in lines})
    assert not any(is_alive(pid) for line in lines for pid in line)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_reach_the_work_once(start, name):
    ending = """import signal
    heard = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: heard.append(number))
    pids.open("a").write("listening\\n")
    while not heard:
        time.sleep(0.01)
    time.sleep(0.2)
    return 100 + len(heard) if heard[0] == signal.%s else 99""".replace("%s", name)
    process, path = start(ending)
    wait_for(lambda: "listening" in path.read_text())
    process.send_signal(signal.Signals[name])
    assert process.wait(60) == 101


@pytest.mark.parametrize("name", sorted(own_ray.VITAL))
def test_the_death_of_a_process_that_ray_needs_is_noticed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(own_ray, "LOOK_EVERY_S", 0.02)
    program = tmp_path / name
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(program), "1000"])
    other = subprocess.Popen(["/bin/sleep", "1000"])
    dead: list[str] = []
    watch = Watch(dead.append)
    try:
        wait_for(lambda: name in watch.seen.values())
        assert (process.pid, name) in [child[:2] for child in children(os.getpid())]
        other.kill()
        process.kill()
        wait_for(lambda: dead)
        assert dead == [name]
    finally:
        watch.close()
        process.wait()
        other.wait()


def test_ray_gets_a_short_folder_where_the_chosen_one_is_too_long_for_sockets(monkeypatch, capsys):
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(variable, "")
    for name in own_ray.SETTINGS:
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "as it was")
    assert prepare() == Path("/tmp/ray") and capsys.readouterr().err == ""
    monkeypatch.setenv("TMPDIR", "/short")
    assert prepare() == Path("/short/ray") and capsys.readouterr().err == ""
    monkeypatch.setenv("RAY_TMPDIR", "/" + "ä" * 20)
    assert prepare() == Path("/tmp/ray")
    said = capsys.readouterr().err
    assert "too long for Ray's sockets" in said and said.count("\n") == 1
    assert os.environ["RAY_AUTH_TOKEN"] == "as it was"
