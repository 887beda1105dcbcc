"""Ranks of one host sum and exchange through memory they share, as they would through gloo."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import environment

WORKER = str(Path(__file__).parent / "shared_worker.py")
pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's"),
]


def outputs(cases: str, ranks: int, tmp_path: Path) -> list[str]:
    """Run cases on some ranks and return what each printed; the output of failures is shown."""
    store = tmp_path / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, cases, str(rank), str(ranks), str(store)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = []
    for process in processes:
        try:
            out, error = process.communicate(timeout=120)
        finally:
            process.kill()
        sys.stderr.write(error)
        said.append(out.strip())
    return said


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_equals_gloo_bit_for_bit(ranks, tmp_path):
    assert outputs("sums,exchanges", ranks, tmp_path) == ["done"] * ranks


def test_groups_of_a_mesh_do_not_disturb_each_other(tmp_path):
    assert outputs("two_groups", 4, tmp_path) == ["done"] * 4


def test_a_killed_rank_is_missed_long_before_the_limit_and_leaves_nothing(tmp_path):
    survivor, victim = outputs("killed", 2, tmp_path)
    assert "rank 1 ended while rank 0 waited for it" in survivor
    assert victim == ""
    assert not [path for path in Path("/dev/shm").iterdir() if "moeyard" in path.name]


def test_a_late_rank_ends_the_wait_at_the_limit(tmp_path):
    assert "longer than parallel.timeout_s = 0.5" in outputs("late", 2, tmp_path)[0]


def test_ranks_that_cannot_share_agree_to_use_gloo(tmp_path):
    assert outputs("no_room,two_hosts", 2, tmp_path) == ["done"] * 2
