"""Placement: owners, holders, and which holder computes a row."""

import random

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.parallel.planning.copies_record import record_of
from moeyard.parallel.planning.dispatch import (
    HolderTable,
    expected_loads,
    largest_share,
    shares_RE,
)
from moeyard.parallel.planning.placement import Placement, Topology


def random_placement(num_experts, num_ranks, seed):
    draw = random.Random(seed)
    ranks = range(num_ranks)
    owners = Placement.owned(num_ranks, [draw.randrange(num_ranks) for _ in range(num_experts)])
    return owners.with_holders(
        [draw.sample(ranks, draw.randrange(num_ranks)) for _ in range(num_experts)]
    )


def test_a_record_of_copies_counts_them_and_says_how_full_the_fullest_rank_is():
    moved = Placement.owned(2, [0, 1, 1, 0])
    copied = moved.with_holders([[1], [], [], []])
    counts_LE = torch.tensor([[60, 20, 20, 0], [0, 0, 0, 0]])
    found = record_of([copied, moved], counts_LE, Topology.one_node(2))
    # Each source keeps its half of expert 0: 30 rows and 70 instead of 60 and 40.
    assert found == {"number": 1, "moved": 4, "share_without": 1.2, "share": 1.4}


@pytest.mark.parametrize(("experts", "ranks"), [(8, 4), (6, 3), (5, 5), (4, 1)])
def test_contiguous_is_expert_over_share(experts, ranks):
    placement = Placement.contiguous(experts, ranks)
    assert placement.owner_E == tuple(e // (experts // ranks) for e in range(experts))
    assert placement.holders_E == tuple((owner,) for owner in placement.owner_E)
    assert placement.copies_R() == [0] * ranks


def test_contiguous_splits_what_does_not_divide_as_evenly_as_it_can():
    owned = [Placement.contiguous(7, 3).owner_E.count(rank) for rank in range(3)]
    assert sorted(owned) == [2, 2, 3]


def test_a_rank_may_own_nothing_or_everything():
    placement = Placement.owned(3, [1, 1, 1])
    assert [placement.owned_by(rank) for rank in range(3)] == [[], [0, 1, 2], []]
    copied = placement.with_holders([[0], [], [2, 0]])
    assert copied.holders_E == ((0, 1), (1,), (0, 1, 2))
    assert copied.copies_R() == [2, 0, 1]
    assert copied.held_by(0) == [0, 2] and copied.owners_only == placement
    assert Placement.from_dict(copied.as_dict()) == copied


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Placement.contiguous(4, 5), "number of ranks is 5, but a layer has 4 expert"),
        (lambda: Placement.contiguous(4, 0), "number of ranks is 0"),
        (lambda: Placement(2, (0, 1), ((0,),)), "owners of 2 experts and holders of 1"),
        (lambda: Placement(2, (0,), ((1,),)), "expert 0 belongs to rank 0"),
        (lambda: Placement(2, (2,), ((2,),)), "expert 0 is on rank 2, but there are 2"),
        (lambda: Placement(2, (0,), ((1, 0),)), "holders of expert 0 are"),
        (lambda: Placement.from_dict({"ranks": 2}), "placement is damaged"),
        (lambda: Topology(4, 3), "ranks of a node are 3"),
        (lambda: Topology(0, 1), "number of ranks is 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(ConfigError, match=sentence) as raised:
        make()
    assert str(raised.value).count("\n") == 0


def test_rows_stay_then_go_to_the_node_then_anywhere():
    topology = Topology(4, 2)
    placement = Placement.owned(4, [0, 2]).with_holders([[1], [3]])

    def visited(source):
        rows = HolderTable.of(placement, topology, source).destinations(
            torch.tensor([[0, 1]] * 4 + [[-1, -1]])
        )
        assert rows[-1].tolist() == [-1, -1]
        return [sorted(rows[:-1, choice].tolist()) for choice in range(2)]

    assert visited(0) == [[0] * 4, [2, 2, 3, 3]]
    assert visited(1) == [[1] * 4, [2, 2, 3, 3]]
    assert visited(3) == [[0, 0, 1, 1], [3] * 4]
    # On one node, every holder is as near as another.
    flat = HolderTable.of(placement, Topology.one_node(4), 3)
    assert sorted(flat.destinations(torch.zeros(4, 1)).flatten().tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("per_node", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_destinations_follow_the_rule_row_by_row(per_node, seed):
    topology, experts = Topology(6, per_node), 5
    placement = random_placement(experts, 6, seed)
    draw = torch.Generator().manual_seed(seed)
    experts_TK = torch.randint(-1, experts, (40, 3), generator=draw)
    for source in range(6):
        table = HolderTable.of(placement, topology, source)
        found = table.destinations(experts_TK)
        taken = {(e, r): 0 for e in range(experts) for r in range(6)}
        for expert, rank in zip(experts_TK.flatten().tolist(), found.flatten().tolist(), strict=1):
            if expert < 0:
                assert rank == -1
                continue
            taken[expert, rank] += 1
        for expert, holders in enumerate(placement.holders_E):
            near = [r for r in holders if topology.node_of(r) == topology.node_of(source)]
            takers = [source] if source in holders else near or holders
            counts = [taken[expert, rank] for rank in takers]
            assert sum(counts) == int((experts_TK == expert).sum())
            assert max(counts) - min(counts) <= 1
        counts_E = torch.bincount(experts_TK[experts_TK >= 0], minlength=experts)
        expected = [[taken[e, r] for e in range(experts)] for r in range(6)]
        assert table.rows_RE(counts_E).tolist() == expected
        assert torch.equal(table.destinations(experts_TK), found)


def test_an_empty_batch_and_a_batch_without_choices_go_nowhere():
    table = HolderTable.of(Placement.contiguous(4, 2), Topology.one_node(2), 0)
    assert table.destinations(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)
    assert table.destinations(torch.full((3, 1), -1)).tolist() == [[-1]] * 3


def test_a_row_for_each_expert_is_spread_over_holders():
    """All experts have the same holders; a source with one row of each must not flood one rank."""
    placement = Placement.owned(4, [0] * 6).with_holders([[1, 2]] * 6)
    rows = HolderTable.of(placement, Topology.one_node(4), 3).destinations(torch.arange(6)[None])
    assert torch.bincount(rows.flatten(), minlength=4).tolist() == [2, 2, 2, 0]


@pytest.mark.parametrize("per_node", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_expected_loads_are_those_of_equal_sources(per_node, seed):
    topology, placement = Topology(4, per_node), random_placement(6, 4, seed)
    counts_E = torch.tensor([12, 24, 120, 36, 48, 0])  # 1 to 4 holders divide them
    exact = sum(HolderTable.of(placement, topology, s).rows_RE(counts_E) for s in range(4))
    assert torch.allclose(exact.sum(1).double(), expected_loads(placement, counts_E * 4, topology))
    assert torch.allclose(shares_RE(placement, topology).sum(0), torch.ones(6).double())


def test_the_largest_share_is_that_of_the_fullest_rank():
    placement = Placement.contiguous(4, 2)
    topology = Topology.one_node(2)
    assert largest_share(placement, torch.tensor([3, 3, 1, 1]), topology) == pytest.approx(1.5)
    assert largest_share(placement, torch.zeros(4), topology) == 1.0
