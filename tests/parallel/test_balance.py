"""Balancers: replicas, materialization, owners over layers and shadowing, by hand and at random."""

import random

import pytest
import torch

from moeyard.errors import CheckpointError, ConfigError
from moeyard.parallel.planning.apportion import replicas_for
from moeyard.parallel.planning.bounds import (
    Traffic,
    busiest_link,
    copies_between_nodes,
    even_sources,
)
from moeyard.parallel.planning.dispatch import expected_loads, largest_share
from moeyard.parallel.planning.load_window import LoadWindow
from moeyard.parallel.planning.materialize import CopyBudget, materialize
from moeyard.parallel.planning.pack import balanced_packs
from moeyard.parallel.planning.placement import Placement, Topology
from moeyard.parallel.planning.replicate import replicate
from moeyard.parallel.planning.reshard import Move, moves, reshard
from moeyard.parallel.planning.shadow import ShadowCosts, shadow, shadow_seconds

ONE_OF_3 = Topology.one_node(3)


def zipf(num_experts, seed, exponent=1.0):
    draw = torch.Generator().manual_seed(seed)
    load_E = 1e6 / torch.arange(1, num_experts + 1).double() ** exponent
    return load_E[torch.randperm(num_experts, generator=draw)].round()


def cases():
    """Loads and topologies of many shapes, idle experts among them."""
    for seed in range(40):
        draw = random.Random(seed)
        nodes, per_node = draw.choice([(1, 2), (1, 3), (2, 2), (2, 3), (4, 2)])
        topology = Topology(nodes * per_node, per_node)
        load_E = zipf(topology.num_ranks * draw.choice([1, 2, 4]), seed, draw.choice([0, 0.5, 2]))
        load_E[draw.sample(range(len(load_E)), draw.randrange(3))] = 0
        yield topology, load_E, draw


def contiguous_share(load_E, topology):
    placement = Placement.contiguous(len(load_E), topology.num_ranks)
    return largest_share(placement, load_E, topology)


# The window of loads.


def test_the_window_is_the_mean_of_the_last_steps_and_survives_a_checkpoint():
    window = LoadWindow.empty(1, 2)
    assert window.mean_LE().tolist() == [[0, 0]]
    for step in range(1, 8):
        window = window.after(torch.tensor([[step, 10]]))
    assert window.mean_LE().tolist() == [[(3 + 4 + 5 + 6 + 7) / 5, 10]]
    again = LoadWindow.empty(1, 2).with_state(window.state_dict())
    assert torch.equal(again.counts_WLE, window.counts_WLE)
    shorter = LoadWindow.empty(1, 2, steps=2).with_state(window.state_dict())
    assert shorter.mean_LE().tolist() == [[6.5, 10]]
    with pytest.raises(CheckpointError, match=r"loads of \[1, 2\] layers and experts"):
        LoadWindow.empty(2, 2).with_state(window.state_dict())


# Replicas.


def test_replicas_follow_the_load():
    assert replicas_for([60, 30, 10], 10, most=10) == [6, 3, 1]
    assert replicas_for([60, 30, 10], 10, most=4) == [4, 4, 2]
    assert replicas_for([1, 1], 9, most=3) == [3, 3]
    assert replicas_for([0, 0, 5], 4, most=2) == [1, 1, 2]


def test_no_other_numbers_of_replicas_have_a_smaller_largest_load():
    draw = random.Random(0)
    for _ in range(50):
        loads = [draw.randrange(1, 100) for _ in range(3)]
        slots = draw.randrange(3, 10)
        found = replicas_for(loads, slots, most=slots)
        assert sum(found) == slots
        best = min(
            max(loads[0] / a, loads[1] / b, loads[2] / (slots - a - b))
            for a in range(1, slots - 1)
            for b in range(1, slots - a)
        )
        assert max(x / n for x, n in zip(loads, found, strict=True)) == best


def test_packs_are_even_and_never_hold_a_kind_twice():
    assert balanced_packs([9, 7, 6, 5, 4, 3], range(6), 2, 3) == [[0, 3, 5], [1, 2, 4]]
    draw = random.Random(1)
    for _ in range(200):
        packs, room = draw.randrange(1, 5), draw.randrange(1, 5)
        kinds = [kind for kind in range(room) for _ in range(packs)]
        weights = [draw.choice([0, 1, 1, 5]) for _ in kinds]
        found = balanced_packs(weights, kinds, packs, room)
        assert sorted(item for pack in found for item in pack) == list(range(len(kinds)))
        assert all(len({kinds[item] for item in pack}) == len(pack) == room for pack in found)


def test_replication_flattens_a_zipf_load_as_eplb_does():
    """256 experts: EPLB goes from 11.17 to 1.02 on 64 ranks with 320 slots, all ranks alike."""
    wide, nodes = Topology.one_node(64), Topology(64, 8)
    loads = [zipf(256, seed) for seed in range(3)]
    before = [contiguous_share(load_E, wide) for load_E in loads]
    alike = [largest_share(replicate(load_E, 5, wide), load_E, wide) for load_E in loads]
    by_node = [largest_share(replicate(load_E, 5, nodes, 8), load_E, nodes) for load_E in loads]
    assert min(before) > 10
    assert max(alike) < 1.04
    assert max(alike) < min(by_node) and max(by_node) < 3


def test_replication_in_groups_keeps_a_group_on_one_node():
    topology = Topology(8, 2)
    placement = replicate(zipf(16, 3), 3, topology, num_groups=8)
    for group in range(8):
        holders = [r for e in (2 * group, 2 * group + 1) for r in placement.holders_E[e]]
        assert len({topology.node_of(rank) for rank in holders}) == 1
    assert [len(placement.held_by(rank)) for rank in range(8)] == [3] * 8


def test_replication_fills_slots_and_is_never_less_even_than_contiguous():
    for topology, load_E, draw in cases():
        ranks = topology.num_ranks
        slots = draw.randint(len(load_E) // ranks, len(load_E))
        placement = replicate(load_E, slots, topology)
        before = contiguous_share(load_E, topology)
        assert largest_share(placement, load_E, topology) <= before + 1e-12
        held = [len(placement.held_by(rank)) for rank in range(ranks)]
        assert held == [slots] * ranks or placement == Placement.contiguous(len(load_E), ranks)
        assert replicate(load_E, slots, topology) == placement


@pytest.mark.parametrize(
    ("slots", "groups", "sentence"),
    [(1, 1, "need 2 to 4"), (5, 1, "slots of a rank are 5"), (2, 3, "number of groups is 3")],
)
def test_slots_and_groups_that_do_not_fit_are_refused(slots, groups, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replicate(torch.ones(4), slots, Topology.one_node(2), groups)


# Copies for a step.


def test_with_memory_for_all_the_busiest_experts_are_on_every_rank():
    owners = Placement.owned(3, [0, 0, 1, 2])
    load_E = torch.tensor([90, 1, 30, 2])
    copied = materialize(owners, load_E, ONE_OF_3, CopyBudget(experts=2, per_rank=2))
    assert copied.holders_E == ((0, 1, 2), (0,), (0, 1, 2), (2,))
    assert copied.owner_E == owners.owner_E


def test_with_less_memory_copies_follow_the_load_and_new_nodes_come_first():
    """A slot on each of 4 ranks. Loads 60, 20 give 4 and 2 replicas: 3 copies and 1 more."""
    topology = Topology(4, 2)
    owners = Placement.owned(4, [0, 2, 3, 3])
    load_E = torch.tensor([60, 20, 1, 1])
    copied = materialize(owners, load_E, topology, CopyBudget(experts=2, per_rank=1))
    # Expert 0: the node of ranks 2 and 3 first, there the idler rank 3; then rank 1; then 2.
    # Expert 1 would have its one copy on a rank of the other node that is free: rank 0.
    assert copied.holders_E == ((0, 1, 2, 3), (0, 2), (3,), (3,))


def test_copies_that_would_bring_rows_to_a_full_rank_are_not_made():
    """Rank 1 computes 9 rows already; a copy of rank 0's expert would make that 12 1/3."""
    owners = Placement.owned(3, [0, 1])
    load_E = torch.tensor([10, 9])
    assert materialize(owners, load_E, ONE_OF_3, CopyBudget(1, 1)) == owners


def test_copies_stay_within_the_budget_and_never_make_the_largest_share_worse():
    made = 0
    for topology, load_E, draw in cases():
        ranks = topology.num_ranks
        owners = Placement.owned(ranks, [draw.randrange(ranks) for _ in range(len(load_E))])
        budget = CopyBudget(draw.randrange(len(load_E) + 2), draw.randrange(4))
        copied = materialize(owners, load_E, topology, budget)
        assert copied.owner_E == owners.owner_E
        assert max(copied.copies_R()) <= budget.per_rank
        several = [e for e, holders in enumerate(copied.holders_E) if len(holders) > 1]
        assert len(several) <= budget.experts and all(load_E[e] > 0 for e in several)
        before, after = (largest_share(p, load_E, topology) for p in (owners, copied))
        assert after <= before + 1e-12
        made += after < before
        assert materialize(owners, load_E, topology, budget) == copied
    assert made > 15


def test_a_budget_counts_whole_experts():
    assert CopyBudget.of_sizes(100, 350.0, overlap_s=2, bytes_per_s=260) == CopyBudget(5, 3)
    assert CopyBudget.of_sizes(100, 100).per_rank == 1
    with pytest.raises(ConfigError, match="copies is 99 bytes, but one expert has 100"):
        CopyBudget.of_sizes(100, 99)


# Owners.


def test_owners_over_two_layers_by_hand():
    """Two ranks, four slots each. Layer 1 has the largest load, so it is placed first.

    Its expert 0 goes to rank 0, which then has fewer free slots; experts 1 to 3 go to rank 1 until
    that has more load, which it never has. Layer 0's busiest goes to rank 1, which has one slot
    left; the rest goes to rank 0.
    """
    load_LE = torch.tensor([[8, 1, 1, 1], [9, 2, 2, 2]])
    current = [Placement.contiguous(4, 2)] * 2
    found = reshard(current, load_LE, Topology.one_node(2), CopyBudget(0, 0))
    assert [placement.owner_E for placement in found] == [(1, 0, 0, 0), (0, 1, 1, 1)]
    assert moves(current, found) == [
        Move(0, 0, 0, 1),
        Move(0, 2, 1, 0),
        Move(0, 3, 1, 0),
        Move(1, 1, 0, 1),
    ]


def test_owned_experts_are_even_over_layers_and_never_worse_than_before():
    changed = 0
    for topology, load_E, draw in cases():
        ranks = topology.num_ranks
        load_LE = torch.stack([load_E[draw.sample(range(len(load_E)), len(load_E))]] * 2)
        load_LE[1] = load_E
        current = [Placement.contiguous(len(load_E), ranks)] * 2
        budget = CopyBudget(draw.randrange(4), draw.randrange(3))
        found = reshard(current, load_LE, topology, budget)
        owned = [sum(len(p.owned_by(rank)) for p in found) for rank in range(ranks)]
        assert max(owned) - min(owned) <= 1 and sum(owned) == load_LE.numel()

        def largest(placements, load_LE=load_LE, topology=topology, budget=budget):
            copied = [
                materialize(p, x, topology, budget)
                for p, x in zip(placements, load_LE, strict=True)
            ]
            return sum(
                float(expected_loads(p, x, topology).max())
                for p, x in zip(copied, load_LE, strict=True)
            )

        assert largest(found) <= largest(current) + 1e-6
        changed += largest(found) < largest(current)
        assert reshard(found, load_LE, topology, budget) == found, "a second time changes nothing"
    assert changed > 10


# Shadows.


def test_shadowing_weighs_rows_against_the_expert_by_hand():
    """Each rank has its own expert. Expert 0 gets 30 rows, 10 from each rank."""
    owners = Placement.contiguous(3, 3)
    counts_SE = torch.tensor([[10, 1, 0], [10, 1, 0], [10, 1, 0]])
    costs = ShadowCosts(row_compute_s=1, row_transfer_s=2, expert_s=100)
    seconds_N, order = shadow_seconds(owners, counts_SE, costs)
    # 30 rows computed, 20 received; then 13 on rank 1 and 2 received; then 11 everywhere.
    assert order == [0, 1, 2]
    assert seconds_N.tolist() == [90 + 160, 39 + 16 + 100, 33 + 200, 33 + 300]
    assert shadow(owners, counts_SE, costs).holders_E == ((0, 1, 2), (1,), (2,))
    dear = ShadowCosts(1, 2, 200)
    assert shadow(owners, counts_SE, dear) == owners


def test_seconds_of_shadows_are_those_of_the_traffic_they_leave():
    for topology, load_E, draw in cases():
        ranks = topology.num_ranks
        owners = Placement.owned(ranks, [draw.randrange(ranks) for _ in range(len(load_E))])
        counts_SE = torch.tensor([[draw.randrange(50) for _ in load_E] for _ in range(ranks)])
        costs = ShadowCosts(1.0, 0.5, 7.0)
        seconds_N, order = shadow_seconds(owners, counts_SE, costs)
        for number in (0, 1, len(order) // 2, len(order)):
            chosen = [range(ranks) if e in order[:number] else () for e in range(len(order))]
            traffic = Traffic.of(owners.with_holders(chosen), counts_SE, topology)
            sent = (traffic.within_node_SR + traffic.between_nodes_SR).sum(dim=0)
            expected = 3 * max(traffic.computed_R) + 4 * 0.5 * int(sent.max()) + 7 * number
            assert float(seconds_N[number]) == pytest.approx(expected)
        assert int(seconds_N.argmin()) == sum(
            len(holders) == ranks for holders in shadow(owners, counts_SE, costs).holders_E
        )


def test_costs_of_shadows_follow_from_sizes():
    costs = ShadowCosts.of_sizes(8, 16, flops_per_s=1e3, bytes_per_s=1e2)
    assert costs == ShadowCosts(2 * 3 * 8 * 16 / 1e3, 8 * 2 / 1e2, 2 * 3 * 8 * 16 * 2 / 1e2)


# Traffic.


def test_traffic_by_hand():
    topology = Topology(4, 2)
    placement = Placement.owned(4, [0, 3]).with_holders([[1], []])
    counts_SE = torch.tensor([[4, 2], [3, 0], [5, 1], [0, 7]])
    traffic = Traffic.of(placement, counts_SE, topology)
    # Ranks 0 and 1 share the five rows of expert 0 on rank 2.
    assert traffic.computed_R == [4 + 3, 3 + 2, 0, 10]
    assert int(traffic.between_nodes_SR.sum()) == 2 + 5
    assert int(traffic.within_node_SR.sum()) == 1
    assert busiest_link(traffic.between_nodes_SR) == 5
    assert traffic.max_over_mean == pytest.approx(10 * 4 / 22)
    assert copies_between_nodes(placement, topology) == 0
    assert copies_between_nodes(placement.with_holders([[1, 2, 3], [0]]), topology) == 2


def test_even_sources_have_equally_many_rows():
    load_E = torch.tensor([5, 3, 1, 0, 8])
    counts_SE = even_sources(load_E, 4)
    assert torch.equal(counts_SE.sum(dim=0), load_E)
    per_source = counts_SE.sum(dim=1)
    assert int(per_source.max() - per_source.min()) <= 1
    assert int((counts_SE.max(dim=0).values - counts_SE.min(dim=0).values).max()) <= 1
