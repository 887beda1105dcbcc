"""Ranks measure links and experts together, and end with the same numbers."""

import json
import subprocess
import sys
from itertools import combinations
from math import comb
from pathlib import Path

import pytest
import torch

from moeyard.moe.experts.resident import Experts
from moeyard.parallel.mesh import Mesh
from moeyard.parallel.planning.cost_model import FREE, OPERATIONS, CostModel, fit
from moeyard.parallel.planning.even_work import even_work
from moeyard.parallel.planning.pipeline import ranked_degrees
from moeyard.parallel.profiling.experts import expert_probes
from moeyard.parallel.profiling.measure import REPEATS, Probe, Trial, halvings, measure

from launch import environment

WORKER = str(Path(__file__).parent / "profiling_worker.py")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[list]:
    """Return the lines that each of two ranks printed."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), "2", str(store)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines = []
    for process in processes:
        try:
            out, error = process.communicate(timeout=100)
        finally:
            process.kill()
        sys.stderr.write(error)
        lines.append([json.loads(line) for line in out.splitlines()])
    return lines


@pytest.mark.dist
def test_all_ranks_end_with_the_same_cost_model(said):
    found = said[0][0]
    assert found["one_level"] == said[1][0]["one_level"]
    assert found["two_levels"] == said[1][0]["two_levels"]
    one, two = found["one_level"], found["two_levels"]
    assert set(one) == {*OPERATIONS, "contention"}
    assert one["contention"] >= 0 and two["contention"] >= 0
    for name in OPERATIONS:
        line = two[name]
        assert line["alpha"] >= 0 and line["beta"] >= 0
        assert line["alpha"] + line["beta"] > 0, name
        is_inside_a_node = name in ("gather", "scatter")
        assert (one[name]["alpha"] + one[name]["beta"] == 0) == is_inside_a_node
    model = CostModel.from_json(json.dumps(one))
    work = even_work(256, 8, 2, row_bytes=256, ranks=2)
    assert ranked_degrees(model, work)[0].forward_s > 0


@pytest.mark.dist
def test_collectives_are_measured_at_every_size(said):
    assert said[0][0]["collectives"] == said[1][0]["collectives"]
    for samples in said[0][0]["collectives"].values():
        assert sorted({size for size, _ in samples}) == [1 << 18, 1 << 19, 1 << 20]
        assert len(samples) == 3 * REPEATS


@pytest.mark.dist
def test_the_slowest_rank_counts_and_all_stop_at_the_same_size(said):
    found = said[0][0]["slow"]
    assert found == said[1][0]["slow"]
    assert found["prepared"][:2] == [1, 2] and 64 not in found["prepared"]
    for size, seconds in found["samples"]["dispatch"]:
        assert size - 1 in found["prepared"], "rank 1 has the larger size"
        assert seconds >= 0.002 * (size - 1)


@pytest.mark.dist
def test_a_killed_rank_ends_the_measurement(said):
    survivor, victim = said
    assert len(victim) == 1
    assert survivor[1] < 20, "the group's time limit"


def test_one_process_measures_its_experts():
    experts = Experts(16, 8, 4, backend="torch")
    probes = expert_probes(experts, range(4), 16, torch.float32, CPU, halvings(64))
    samples = measure(probes, Mesh(), CPU)
    assert {name: len(found) for name, found in samples.items()} == {
        "experts": 5 * REPEATS,
        "experts_backward": 5 * REPEATS,
    }
    assert fit(samples["experts"]).seconds(64) > 0
    assert CostModel.fitted(samples).dispatch == FREE
    assert all(parameter.grad is None for parameter in experts.parameters())


def test_what_precedes_a_run_is_repeated_and_not_timed():
    calls = []

    def prepare(amount: int) -> Trial:
        return Trial(amount, lambda: calls.append("run"), before=lambda: calls.append("before"))

    samples = measure([Probe("experts", [1, 2], prepare)], Mesh(), CPU)
    assert calls == ["before", "run"] * 2 * (1 + REPEATS)
    assert [size for size, _ in samples["experts"]] == [1] * REPEATS + [2] * REPEATS


def test_halvings_rise_to_the_largest():
    assert halvings(4096) == [256, 512, 1024, 2048, 4096]
    assert halvings(3) == [1, 3]


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_even_work_is_the_mean_over_all_choices(ranks_per_node):
    choices = list(combinations(range(8), 3))
    assert len(choices) == comb(8, 3)
    nodes = sum(len({e // (2 * ranks_per_node) for e in chosen}) for chosen in choices)
    ranks = sum(len({e // 2 for e in chosen}) for chosen in choices)
    work = even_work(10, 8, 3, 4, ranks=4, ranks_per_node=ranks_per_node)
    assert work.rows == 30
    assert work.sent_bytes == pytest.approx(10 * 4 * nodes / len(choices))
    inside = 0 if ranks_per_node == 1 else 10 * 4 * ranks / len(choices)
    assert work.node_bytes == pytest.approx(inside)
    assert even_work(10, 8, 3, 4, ranks=4, to_all=True).sent_bytes == 10 * 4 * 4
