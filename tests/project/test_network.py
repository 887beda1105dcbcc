"""The slow network of benchmarks, as far as no root is needed, and the skews that run on it."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moeyard.errors import ConfigError, MoeyardError

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
E, K, TOKENS, SEED = 16, 3, 4000, 5


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


@pytest.fixture
def skew():
    return importlib.import_module("skew")


@pytest.fixture
def bed():
    return importlib.import_module("network_bed")


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one_hot", "rotating", "burst"])
def test_tokens_choose_different_experts_by_their_popularity(skew, kind):
    step = 38  # of a burst
    experts_TK = skew.experts_of(kind, step, TOKENS, E, K, SEED)
    assert experts_TK.dtype == torch.int32 and experts_TK.shape == (TOKENS, K)
    assert all(len(set(row)) == K for row in experts_TK.tolist())
    order_E = np.random.default_rng(SEED).permutation(E)
    first_E = np.bincount(experts_TK[:, 0], minlength=E)[order_E] / TOKENS
    wanted_E = skew.KINDS[kind](step, E)
    assert wanted_E.sum() == pytest.approx(1)
    assert np.abs(first_E - wanted_E).max() < 4 * np.sqrt(wanted_E.max() / TOKENS)
    assert torch.equal(experts_TK, skew.experts_of(kind, step, TOKENS, E, K, SEED))
    assert not torch.equal(experts_TK, skew.experts_of(kind, step + 1, TOKENS, E, K, SEED))


def test_the_hot_set_moves_on_and_comes_back(skew):
    hot = [set(np.flatnonzero(skew.rotating(step, E) > 0.1)) for step in range(0, 90, 10)]
    assert hot[:8] == [{first, first + 1} for first in range(0, E, 2)]
    assert hot[8] == hot[0]
    assert np.array_equal(skew.rotating(0, E), skew.rotating(9, E))


def test_bursts_are_short_and_hit_one_expert_after_another(skew):
    hot = [skew.burst(step, E).argmax() for step in range(60) if skew.burst(step, E).max() > 0.1]
    assert hot == [0, 0, 1, 1, 2, 2]


def test_wrong_skews_are_refused(skew):
    with pytest.raises(ConfigError, match="one_hot"):
        skew.experts_of("hot", 0, 1, E, K)
    with pytest.raises(ConfigError, match="k is 17"):
        skew.experts_of("zipf", 0, 1, E, 17)


def test_links_that_carried_less_than_expected_are_an_error(bed):
    before = bed.Traffic({"node0": 100}, {"node0": 7}, {"node0": 1})
    added = bed.Traffic({"node0": 350}, {"node0": 9}, {"node0": 1}).since(before)
    assert added == bed.Traffic({"node0": 250}, {"node0": 2}, {"node0": 0})
    added.check_sent({"node0": 250})
    with pytest.raises(MoeyardError, match="node0 sent 250 bytes over its link and 251"):
        added.check_sent({"node0": 251})


def test_ranks_of_a_node_have_its_address_only_where_they_are_together(bed):
    isolated, together = (
        bed.Network(nodes=2, ranks_per_node=2, ranks=kind) for kind in ("isolated", "together")
    )
    assert len({isolated.address(rank) for rank in range(4)}) == 4
    assert together.address(0) == together.address(1) != together.address(2)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"nodes": 1}, "nodes is 1"),
        ({"inter": "1Gb"}, "'1Gb'"),
        ({"intra": "0gbit"}, "'0gbit'"),
        ({"ranks": "apart"}, "'apart'"),
    ],
)
def test_wrong_networks_are_refused(bed, wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        bed.Network(**wrong)


def test_without_root_nothing_is_made(bed, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MoeyardError, match="root"), bed.Network():
        pass
