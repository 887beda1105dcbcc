"""Experts are copied only where the copies save more time than they cost."""

import pytest
import torch

from moeyard.parallel.planning.bounds import Traffic, busiest_link, even_sources
from moeyard.parallel.planning.calibrate import CopyCosts, calibrate, link_rows
from moeyard.parallel.planning.cost_model import FREE, Linear
from moeyard.parallel.planning.materialize import CopyBudget, materialize
from moeyard.parallel.planning.placement import Placement, Topology

OWNERS = Placement.contiguous(8, 4)
ONE_NODE = Topology(4, 4)
HOT = torch.tensor([800, 100, 100, 100, 100, 100, 100, 100])
ALL = CopyBudget(8, 8)


def costs(**changed) -> CopyCosts:
    values = {"row_s": 1.0, "link_row_s": 0.0, "gather": FREE, "reduce": FREE, "contention": 0.0}
    return CopyCosts(**(values | changed))


def copied(placement: Placement) -> list[int]:
    return [expert for expert, ranks in enumerate(placement.holders_E) if len(ranks) > 1]


def test_free_copies_are_made_and_dear_ones_are_not():
    assert 0 in copied(calibrate(OWNERS, HOT, ONE_NODE, ALL, costs()))
    dear = costs(gather=Linear(0, 1e6))
    assert calibrate(OWNERS, HOT, ONE_NODE, ALL, dear) == OWNERS


def test_only_the_hot_expert_is_copied_where_each_copy_costs():
    """One copy saves 600 rows; a second would save a few."""
    paid = costs(gather=Linear(0, 60.0), contention=1.0)
    assert copied(calibrate(OWNERS, HOT, ONE_NODE, ALL, paid)) == [0]


@pytest.mark.parametrize(
    ("line", "times"), [("gather", {}), ("reduce", {}), ("gather", {"gathers": 2})], ids=str
)
def test_a_copy_must_save_what_its_way_there_and_back_costs(line, times):
    saved = (800 + 100) - (800 / 4 + 100 + 100)  # rows of the fullest rank
    each = saved / times.get("gathers", 1)
    for factor, expected in ((1.01, []), (0.99, [0])):
        paid = costs(**{line: Linear(0, factor * each)}, **times, contention=1.0)
        assert copied(calibrate(OWNERS, HOT, ONE_NODE, CopyBudget(1, 1), paid)) == expected


def test_copies_that_hide_behind_experts_cost_nothing():
    hidden = costs(reduce=Linear(0, 250.0))
    assert copied(calibrate(OWNERS, HOT, ONE_NODE, CopyBudget(1, 1), hidden)) == [0]


def test_a_layer_without_load_has_no_copies():
    assert calibrate(OWNERS, torch.zeros(8), ONE_NODE, ALL, costs()) == OWNERS


@pytest.mark.parametrize("per_node", [1, 2, 4])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_rows_of_links_are_those_that_travel(per_node, number):
    topology = Topology(4, per_node)
    load_E = HOT * 4
    placement = materialize(OWNERS, load_E, topology, CopyBudget(number, 2))
    traffic = Traffic.of(placement, even_sources(load_E, 4), topology)
    if 1 < per_node < 4:
        rows_PP = traffic.between_nodes_SR.view(2, 2, 2, 2).sum(dim=(1, 3))
        expected = busiest_link(rows_PP) / per_node
    else:
        own = torch.eye(4, dtype=torch.bool)
        expected = busiest_link(torch.where(own, 0, traffic.rows_SR))
    assert link_rows(placement, load_E, topology) == pytest.approx(expected, rel=0.02)
