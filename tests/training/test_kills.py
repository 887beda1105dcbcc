"""A run that is killed ends as the unbroken one, bit for bit."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kills import OVERRIDES, Launch, digest, is_alive, kill_at_random, wait_until
from launch import environment, run

KILLS = 10
EXTRA_DRAW = str(Path(__file__).parent / "extra_draw.py")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, config_file) -> str:
    launch = Launch(config_file, tmp_path_factory.mktemp("unbroken") / "run")
    launch.start()
    assert launch.wait() == 0, launch.log()
    return digest(launch.run_dir)


def broken(launch: Launch, kills: int, seed: int) -> str:
    launch.start()
    hit = kill_at_random(launch, kills, seed)
    assert launch.wait() == 0, launch.log()
    print(f"\n{kills} kills, seed {seed}: {hit}; started or resumed {launch.starts()} times")
    assert hit["inside a save"] > 0
    return digest(launch.run_dir)


@pytest.mark.dist
def test_a_run_killed_inside_an_asynchronous_save_ends_as_the_unbroken_one(
    tmp_path, config_file, unbroken
):
    launch = Launch(config_file, tmp_path / "run", overrides=["checkpoint.asynchronous=true"])
    assert broken(launch, 1, seed=0) == unbroken


@pytest.mark.dist
def test_workers_that_lose_their_agent_while_they_start_do_not_live_on(tmp_path, config_file):
    launch = Launch(config_file, tmp_path / "run")
    launch.start()
    wait_until(lambda: len(launch.workers()) == 2, "workers")
    workers = launch.workers()
    os.kill(launch.agent.pid, signal.SIGKILL)
    launch.wait()
    wait_until(lambda: not any(map(is_alive, workers.values())), "workers to die", 10)


@pytest.mark.dist
def test_torchrun_may_be_process_1_as_in_a_container(tmp_path, config_file):
    """Its workers' parent is then process 1, and alive."""
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a process namespace")
    command = [*alone, sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1", "-m", "moeyard.training", str(config_file)]
    output = run([*command, f"run_dir={tmp_path}/run", "train.steps=2"], timeout=120)
    assert "event=evaluated step=2" in output


@pytest.mark.chaos
def test_agents_of_two_hosts_recover_from_a_killed_worker(tmp_path, config_file):
    """Each agent counts restarts for itself, and only one of them counts this one."""
    run_dir = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--max-restarts", "5", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    command += ["-m", "moeyard.training", str(config_file), *OVERRIDES, f"run_dir={run_dir}"]
    env = environment(GLOO_SOCKET_IFNAME="lo")
    agents = []
    for number in range(2):
        with (tmp_path / f"log{number}.txt").open("w") as log:
            agents.append(subprocess.Popen(command, env=env, cwd="/", stdout=log, stderr=log))
    launch = Launch(config_file, run_dir)
    launch.agent = agents[1]
    wait_until((run_dir / "latest").exists, "a checkpoint")
    os.kill(next(iter(launch.workers().values())), signal.SIGKILL)
    logs = [(tmp_path / f"log{number}.txt").read_text for number in range(2)]
    assert [agent.wait(timeout=180) for agent in agents] == [0, 0], logs[0]() + logs[1]()
    assert "event=resumed" in logs[0]() + logs[1]()


@pytest.mark.chaos
def test_a_run_killed_ten_times_ends_as_the_unbroken_one(tmp_path, config_file, unbroken):
    found = broken(Launch(config_file, tmp_path / "run"), KILLS, seed=1)
    print(f"digest of the unbroken run {unbroken}\ndigest of the killed run   {found}")
    assert found == unbroken


@pytest.mark.chaos
def test_the_digest_shows_one_extra_random_number(tmp_path, config_file, unbroken):
    launch = Launch(config_file, tmp_path / "run", [EXTRA_DRAW])
    launch.start()
    wait_until((launch.run_dir / "latest").exists, "a checkpoint to resume from")
    os.kill(launch.workers()[0], signal.SIGKILL)
    assert launch.wait() == 0 and "event=resumed" in launch.log()
    found = digest(launch.run_dir)
    print(f"\ndigest with one extra draw {found}")
    assert found != unbroken
