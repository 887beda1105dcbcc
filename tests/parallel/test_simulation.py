"""A step on paper: formulas against small cases by hand, and what must hold for any cluster."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulation_cases import cluster_of, model_of, work_of

from moeyard.errors import ConfigError
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.routers.router import Router
from moeyard.parallel.dense.gradients import expert_parameter_names
from moeyard.parallel.planning.cost_model import Linear
from moeyard.parallel.planning.even_work import even_work
from moeyard.parallel.planning.pipeline import DEGREES, ranked_degrees
from moeyard.parallel.simulation import flops
from moeyard.parallel.simulation.choices import Choices, skewed
from moeyard.parallel.simulation.compute import Compute
from moeyard.parallel.simulation.experts import Layer, Travel
from moeyard.parallel.simulation.fit import Measured, fitted
from moeyard.parallel.simulation.gradients import BUCKET_BYTES, Sharded, Stage, all_reduced
from moeyard.parallel.simulation.links import Links
from moeyard.parallel.simulation.memory import memory_of
from moeyard.parallel.simulation.placed import place
from moeyard.parallel.simulation.sizes import Sizes
from moeyard.parallel.simulation.step import simulate
from moeyard.parallel.simulation.workload import Fold, Group

LATENT = {"kv_rank": 32, "q_rank": 24, "nope_dim": 16, "rope_dim": 8, "v_dim": 12}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "attention": {"qk_norm": "projection", "qkv_bias": True}},
        {"attention": {"qk_norm": None, "sinks": True, "o_bias": True}},
        {"attention": {"latent": LATENT}},
        {"attention": {"latent": {**LATENT, "q_rank": None}, "qkv_bias": True}},
        {"d_ff": 300, "dense_layers": (0, 2)},
        {
            "moe": {
                "num_experts": 4,
                "d_expert": 64,
                "d_shared": 96,
                "shared_gate": True,
                "expert_bias": True,
                "router": {"kind": "hash"},
            }
        },
    ],
)
def test_parameters_are_those_of_the_decoder(changes):
    model = model_of(**changes)
    with torch.device("meta"):
        decoder = Decoder(model)
    experts = expert_parameter_names(decoder)
    routers = {p for m in decoder.modules() if isinstance(m, Router) for p in m.parameters()}
    counted = {"experts": 0, "routers": 0, "dense": 0}
    for name, parameter in decoder.named_parameters():
        kind = "experts" if name in experts else "routers" if parameter in routers else "dense"
        counted[kind] += parameter.numel()
    sizes = Sizes.of(model)
    assert counted == {"experts": sizes.experts, "routers": sizes.routers, "dense": sizes.dense}


def test_operations_of_a_small_model_by_hand():
    model = model_of(
        vocab_size=10,
        d_model=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        moe={"num_experts": 4, "d_expert": 3, "router": {"kind": "topk", "k": 2}},
    )
    # Queries and output 8 x 8, keys and values 8 x 4 each.
    assert flops.projections(model, 5) == 2 * 5 * (64 + 64 + 32 + 32)
    # Five tokens see 1 to 5 positions, of 8 numbers, for scores and for values.
    assert flops.attention(model, 0, 5, 5) == 2 * (1 + 2 + 3 + 4 + 5) * (8 + 8)
    assert flops.router(model, 5) == 2 * 5 * 8 * 4
    assert flops.gated_mlp(model, 3, 10) == 2 * 10 * (3 * 8 * 3)
    assert flops.head(model, 5) == 2 * 5 * 8 * 10
    forward = 1920 + 480 + 320 + 1440 + 800
    assert flops.model_flops(model, 5, 5) == 3 * forward


@pytest.mark.parametrize("length, window", [(7, 3), (7, 7), (7, None), (7, 1), (4, 9)])
def test_a_token_sees_what_the_mask_shows(length, window):
    seen = [min(position + 1, window or length) for position in range(length)]
    assert flops.visible(length, window) == pytest.approx(sum(seen) / length)


def test_collectives_send_what_rings_and_all_to_alls_send():
    link = {"achieved": 1.0, "latency": "0s"}
    cluster = cluster_of(
        inside_node={**link, "bandwidth": "100B/s"}, between_nodes={**link, "bandwidth": "10B/s"}
    )
    links = Links.of(cluster, 8)
    inside, everyone = Group(8, 8), Group(16, 8)
    assert links.all_reduce(inside).seconds(800) == pytest.approx(2 * 7 / 8 * 800 / 100)
    assert links.all_gather(inside).seconds(800) == pytest.approx(7 / 8 * 800 / 100)
    # Eight cards carry eight rings from node to node.
    assert links.all_reduce(everyone).seconds(800) == pytest.approx(2 * 15 / 16 * 800 / 80)
    # Ranks of equal number: each has its card alone.
    assert links.all_reduce(Group(2, 1)).seconds(800) == pytest.approx(2 * 1 / 2 * 800 / 10)
    # Half of the bytes leave the node.
    assert links.all_to_all(everyone).seconds(1600) == pytest.approx(800 / 10)
    assert links.all_to_all(inside).seconds(800) == pytest.approx(700 / 100)
    one = Group(1, 1)
    assert links.all_reduce(one).seconds(8) == links.all_to_all(one).seconds(8) == 0


def test_ranks_that_share_a_card_fill_it_by_their_mean():
    odds_E = np.array([4.0, 1, 1, 1])
    visits_R = Choices(odds_E, 1).visits_E()  # an expert on each of four ranks
    travel = Travel.of(Choices(odds_E, 1), np.eye(4), 10, per_node=2, per_card=2)
    assert travel.copies == pytest.approx(40 * visits_R[0])
    assert travel.card_copies == pytest.approx(40 * (visits_R[0] + visits_R[1]) / 2)
    assert Travel.of(Choices(odds_E, 1), np.eye(4), 10, 2).card_copies == travel.copies
    links, everyone = Links.of(cluster_of(), 8), Group(16, 8)
    whole, half = links.all_to_all(everyone).beta, links.all_to_all(everyone, 0.5).beta
    assert half == pytest.approx(whole / 2)


def test_a_ring_has_the_pace_of_its_slowest_hop():
    slow = {"bandwidth": "10B/s", "achieved": 1.0, "latency": "0s"}
    cluster = cluster_of(
        collectives="gloo",
        inside_node={**slow, "bandwidth": "5B/s"},
        between_nodes={**slow, "gpus_per_nic": 8},
    )
    # The ring between nodes has the whole card, 10 B/s, and a hop inside a node 5 B/s.
    ring = Links.of(cluster, 8).all_reduce(Group(16, 8))
    assert ring.seconds(80) == pytest.approx(2 * 15 / 16 * 80 / 5)


def test_a_processor_packs_at_its_own_rate_whatever_the_link_has():
    for bandwidth in ("10B/s", "40B/s"):
        link = {"bandwidth": bandwidth, "achieved": 0.5, "achieved_all_to_all": 0.25}
        plain = Links.of(cluster_of(inside_node=link), 8).all_to_all(Group(8, 8))
        busy = Links.of(cluster_of(inside_node={**link, "host": "20B/s"}), 8)
        assert busy.all_to_all(Group(8, 8)).beta == pytest.approx(plain.beta + 7 / 8 / 20)
        assert busy.inside_s == pytest.approx(2 / float(bandwidth[:2]) + 1 / 20)


def test_an_oversubscribed_leaf_slows_what_leaves_it_and_shared_cards_all_that_leaves_a_node():
    plain = Links.of(cluster_of(), 8).all_to_all(Group(64, 8))
    shared = Links.of(cluster_of(between_nodes={"gpus_per_nic": 2}), 8).all_to_all(Group(64, 8))
    assert shared.beta == pytest.approx(2 * plain.beta)
    leaf = {"leaf_nodes": 4, "oversubscription": 4}
    links = Links.of(cluster_of(between_nodes=leaf), 8)
    assert links.all_to_all(Group(32, 8)) == Links.of(cluster_of(), 8).all_to_all(Group(32, 8))
    # Of eight nodes, four are behind the leaf: 4/7 of what goes to other nodes, at a quarter.
    assert links.all_to_all(Group(64, 8)).beta == pytest.approx(4 * 4 / 7 * plain.beta)


def test_gradients_travel_while_backward_runs_and_the_rest_after_it():
    line = Linear(0.5, 1 / BUCKET_BYTES)  # 1.5 s for a bucket
    parameters = BUCKET_BYTES // 4
    stages = [Stage(1.0, 0.0, parameters), Stage(2.0, 1.0, 2 * parameters), Stage(1.0, 0.0, 0)]
    # After the first stage 1.5 s wait. The second has 1 s for them and adds 3 s; the last has 1 s.
    waiting = all_reduced(stages, line, 4)
    assert waiting.exposed_s == pytest.approx(1.5 + 3 - 1 - 1)
    assert waiting.hidden_s == pytest.approx(2.0)
    # What is less than a bucket is sent at the end.
    assert all_reduced([Stage(9.0, 0.0, parameters // 2)], line, 4).seconds == pytest.approx(1.0)


def test_fsdp_gathers_the_next_unit_while_one_computes():
    sharded = Sharded(Linear(0.0, 1.0), Linear(0.0, 2.0), 1, 1, overlaps=True)
    stages = [Stage(3.0, 0.0, 2), Stage(3.0, 1.0, 5)]
    # The root and the first unit are waited for, and 2 of the 5 s that the second one takes.
    assert sharded.forward(stages, 4).exposed_s == pytest.approx(4 + 2 + 2)
    # In backward, the first unit's sum takes 4 s, of which the second stage hides 2. That of the
    # second unit takes 10 s and that of the root 8.
    waiting = sharded.backward(stages, 4, sums=True)
    assert waiting.exposed_s == pytest.approx(2 + 2 + (4 - 2) + 10 + 8)
    waits = replace(sharded, overlaps=False)
    assert waits.forward(stages, 4).exposed_s == pytest.approx(4 + 2 + 5)
    assert waits.backward(stages, 4, sums=True).exposed_s == pytest.approx(7 + 14 + 8)


@pytest.mark.parametrize("num_gpus, ep", [(8, 8), (64, 16)])
def test_the_chosen_chunks_are_those_of_planning(num_gpus, ep):
    slow = cluster_of(between_nodes={"bandwidth": "5Gbit/s"}, inside_node={"bandwidth": "2GB/s"})
    work = work_of(ep=ep, path="auto", chunks="auto", batch_sequences=512)
    found = simulate(work, slow, num_gpus)
    schedule = found.schedules[0]
    fold = Fold.of(work, slow, num_gpus)
    layer = Layer(Compute(work, slow, fold), Links.of(slow, 8), found.placed[0].travel)
    best = []
    for kind in ("all_to_all", "hierarchical")[: 1 + (ep > 8)]:
        ranked = ranked_degrees(layer.model(kind), layer.layer_work(kind), DEGREES)[0]
        best.append((ranked.seconds, kind, ranked.forward, ranked.backward))
    timed = {kind: layer.with_chunks(kind, f, b).seconds for _, kind, f, b in best}
    wanted = min(best, key=lambda one: timed[one[1]])
    assert (schedule.path, schedule.forward_chunks, schedule.backward_chunks) == wanted[1:]
    assert schedule.forward_chunks > 1
    assert schedule.forward.seconds + schedule.backward.seconds == pytest.approx(wanted[0])


def test_travel_without_skew_is_that_of_planning():
    work = work_of(ep=16)
    fold = Fold.of(work, cluster_of(), 64)
    compute = Compute(work, cluster_of(), fold)
    travel = place(compute, Links.of(cluster_of(), 8), Choices.even(16, 2)).travel
    one = even_work(fold.tokens, 16, 2, 1, ranks=16)
    two = even_work(fold.tokens, 16, 2, 1, ranks=16, ranks_per_node=8)
    assert travel.rows == pytest.approx(one.rows)
    assert travel.copies == pytest.approx(one.sent_bytes)
    assert travel.copies == pytest.approx(two.node_bytes)
    assert travel.node_copies == pytest.approx(two.sent_bytes)


def test_one_gpu_waits_for_nothing():
    found = simulate(work_of(ep=1, batch_sequences=8), cluster_of(), 1)
    assert found.exposed_s == 0
    assert found.step_s == pytest.approx(sum(found.phases_s.values()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dense": "fsdp", "recompute": True},
        {"accumulation": 4, "dense": "fsdp"},
        {"path": "hierarchical", "chunks": 2, "ep": 16},
        {"path": "all_gather", "recompute": "experts"},
        {"expert_tp": 2},
        {"has_gradient_slices": True, "chunks": 2},
        {"copy_bytes": 1 << 30},
        {"shards_experts": True},
    ],
)
def test_parts_and_phases_are_the_same_step_and_faster_links_are_never_slower(changes):
    work = work_of(**changes)
    choices_L = skewed("zipf:1", 16, 2, 4)
    before = None
    for factor in (1, 3, 10, 100):
        cluster = cluster_of(
            between_nodes={"bandwidth": f"{20 * factor}Gbit/s"},
            inside_node={"bandwidth": f"{5 * factor}GB/s"},
        )
        found = simulate(work, cluster, 64, choices_L)
        assert found.step_s == pytest.approx(sum(found.phases_s.values()))
        assert all(seconds >= 0 for seconds in found.parts_s.values())
        assert before is None or found.step_s <= before * (1 + 1e-9)
        before = found.step_s


@pytest.mark.parametrize("name", ["step_s", "memory"])
def test_more_skew_is_never_faster_or_smaller(name):
    sizes = []
    for exponent in ("0", "0.5", "1", "1.5", "2"):
        found = simulate(work_of(), cluster_of(), 64, skewed(f"zipf:{exponent}", 16, 2, 4))
        sizes.append(found.step_s if name == "step_s" else found.memory.total)
    assert sizes == sorted(sizes)
    even = simulate(work_of(), cluster_of(), 64)
    assert sizes[0] == pytest.approx(even.step_s if name == "step_s" else even.memory.total)


def test_copies_are_made_where_they_pay():
    slow = cluster_of(between_nodes={"bandwidth": "10Gbit/s"})
    hot = skewed("zipf:2", 16, 2, 4)
    work = work_of(batch_sequences=2048)
    without = simulate(work, slow, 64, hot)
    found = simulate(replace(work, copy_bytes=1 << 30), slow, 64, hot)
    assert sum(p.num_copies for p in found.placed) > 0
    assert found.step_s < without.step_s
    assert all(p.share < p.owners_share for p in found.placed)
    even = simulate(replace(work, copy_bytes=1 << 30), slow, 64)
    assert sum(p.num_copies for p in even.placed) == 0


def test_memory_that_stays_is_counted_by_hand():
    work, model = work_of(), model_of()
    sizes = Sizes.of(model)
    dense, experts = sizes.dense, sizes.experts / 8
    fold = Fold.of(work, cluster_of(), 64)
    memory = memory_of(work, fold, 1.0, 1.0)
    # bf16 weights, fp32 masters, main gradients and two moments; routers are fp32 throughout.
    assert memory.kept == pytest.approx(18 * (dense + experts) + 16 * sizes.routers)
    split = memory_of(replace(work, dense="fsdp"), fold, 1.0, 1.0)
    wanted = 16 * dense / 64 + 18 * experts + 16 * sizes.routers
    assert split.kept == pytest.approx(wanted)
    # Eight ranks hold the same experts, and each has an eighth of their masters and moments.
    shared = memory_of(replace(work, shards_experts=True), fold, 1.0, 1.0)
    assert memory.kept - shared.kept == pytest.approx(12 * experts * 7 / 8)
    whole = memory_of(replace(work, precision="fp32", ep=1), fold, 1.0, 1.0)
    assert whole.kept == pytest.approx(16 * sizes.total)


def test_recomputing_keeps_less_and_takes_longer():
    kinds = [False, "experts", True]
    found = [simulate(work_of(recompute=kind), cluster_of(), 64) for kind in kinds]
    sizes = [one.memory.activations for one in found]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    times = [one.step_s for one in found]
    assert times == sorted(times) and len(set(times)) == 3


def test_a_description_is_found_again_from_runs():
    hidden = cluster_of(
        gpu={
            "achieved": 0.3,
            "achieved_experts": 0.2,
            "achieved_attention": 0.1,
            "memory_achieved": 0.5,
            "layer_latency": "50us",
        },
        between_nodes={"achieved": 0.4, "achieved_all_to_all": 0.3, "latency": "30us"},
    )
    works = [
        (work_of(ep=1, batch_sequences=64), 8),
        (work_of(ep=16, batch_sequences=2048), 64),
        (work_of(ep=2, sequence_length=128), 16),
        (work_of(model_of(d_model=512), dense="fsdp"), 64),
    ]
    runs = []
    for number, (work, num_gpus) in enumerate(works):
        found = simulate(work, hidden, num_gpus)
        phases = {name: found.phases_s[name] for name in ("forward", "backward", "reduce")}
        runs.append(Measured(str(number), work, num_gpus, found.step_s, phases))
    cluster = fitted(cluster_of(), runs)
    for run in runs:
        assert run.predict(cluster).step_s == pytest.approx(run.step_s, rel=0.03)
    other = work_of(model_of(d_model=384), ep=16, batch_sequences=1024)
    wanted = simulate(other, hidden, 32).step_s
    assert simulate(other, cluster, 32).step_s == pytest.approx(wanted, rel=0.08)
    assert abs(simulate(other, cluster_of(), 32).step_s / wanted - 1) > 0.2


@pytest.mark.parametrize(
    "num_gpus, changes, wanted",
    [
        (12, {}, "does not fill nodes of 8 GPUs"),
        (8192, {}, "has 512 nodes of 8 GPUs; use 1 to 4096"),
        (8, {"ep": 16}, "use a multiple of 16"),
        (24, {"ep": 3}, "does not divide model.moe.num_experts = 16"),
        (1024, {}, "or --sequences-per-gpu"),
        (8, {"precision": "fp64"}, "add the peak of fp64"),
    ],
)
def test_gpus_that_do_not_fold_are_refused_in_a_sentence(num_gpus, changes, wanted):
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as error:
        simulate(work_of(**changes), cluster_of(), num_gpus)
    assert wanted in str(error.value)


def test_hierarchical_travel_never_counts_more_copies_between_nodes():
    travel = Travel.of(
        skewed("zipf:1", 16, 2, 1)[0], torch.eye(16).numpy().astype(float), tokens=64, per_node=4
    )
    assert travel.node_copies <= travel.copies * 4
