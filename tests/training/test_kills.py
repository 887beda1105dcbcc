"""A run that is killed ends as the unbroken one, bit for bit."""

import os
import signal
from pathlib import Path

import pytest
from kills import Launch, digest, kill_at_random, wait_until

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
def test_a_run_killed_inside_a_save_ends_as_the_unbroken_one(tmp_path, config_file, unbroken):
    assert broken(Launch(config_file, tmp_path / "run"), 1, seed=0) == unbroken


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
