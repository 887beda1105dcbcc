"""Every way of rows to their experts gives the numbers of one process, in any number of chunks."""

import json
import shutil
import sys
import time
from typing import cast

import pytest
import torch
from torch.distributed import ProcessGroup

from moeyard.errors import ConfigError, DataError
from moeyard.moe.routes.identity import identity_of
from moeyard.parallel.experts.lane import Lane
from moeyard.parallel.experts.open_path import open_path
from moeyard.parallel.experts.pipelined import Degrees
from moeyard.parallel.mesh import Mesh
from moeyard.parallel.planning.plan_file import LayerPlan, PlanFile, write_plan
from moeyard.training.checkpoints.checkpoint import StoredTensors
from moeyard.training.data.tokenizer import open_tokenizer
from moeyard.training.ownership import planned_owners
from moeyard.training.read_config import read_run_config
from moeyard.training.setup import fill_vocabulary

from equivalence import EXACT as IN_FP64
from equivalence import WORKER, differences, gathered_from
from launch import run, torchrun

EXACT = [*IN_FP64, "model.num_layers=3"]
TORCH = [*EXACT, "parallel.backend=torch"]
BOTH = ["train.accumulation=2", "train.recompute=true"]
PLANNED = ((1, 0, 0, 0), (0, 1, 1, 1), (1, 1, 0, 0))
"""The owner of each expert at the start, by layer, where a case has a plan."""
COPY_BYTES = (3 * 16 * 32 + 2 * 16 + 32) * (8 + 8)
"""Weights, biases and gradients of one expert of the test configuration."""
LIKE = {
    "plain": {"overrides": TORCH},
    "both": {"overrides": [*EXACT, *BOTH, "model.moe.d_shared=8"]},
    "starved": {"overrides": TORCH, "starved": True},
    "varying": {"overrides": [*TORCH, "model.moe.router={kind: top_p, p: 0.3}"]},
    "sparsity": {
        "overrides": [
            *EXACT,
            "model.moe.activation=reglu",
            "model.moe.router={kind: sparsity, z_loss: 0.1}",
            *BOTH,
        ],
        "biased": True,
    },
    "limited": {
        "overrides": [
            *TORCH,
            "model.moe.router={kind: topk, k: 2, capacity: {factor: 0.75, drop: probability}}",
            *BOTH,
        ],
    },
    "biased": {"overrides": [*TORCH, "model.moe.activation=geglu", *BOTH], "biased": True},
    "router": {"overrides": [*TORCH, "train.parameters=router"], "biased": True},
    "chosen": {"overrides": [*EXACT, "model.moe.router={kind: expert_choice, k: 2}"]},
    "lora": {"overrides": [*EXACT, "train.parameters=lora", "train.accumulation=2"]},
    "muon": {"overrides": [*TORCH, "optimizer.kind=muon"], "starved": True},
    "frugal": {"overrides": [*TORCH, "optimizer.kind=frugal", "optimizer.refresh_steps=2"]},
}
"""What one process computes."""
PATHS: dict[str, list[str]] = {
    "whole": [],
    "chunked": ["parallel.chunks=4", "parallel.backward_chunks=2"],
    "gathered": ["parallel.path=all_gather", "parallel.chunks=2", "parallel.backward_chunks=3"],
    "hierarchical": ["parallel.path=hierarchical", "parallel.ranks_per_node=2"],
    "pipelined": [
        "parallel.path=hierarchical",
        "parallel.ranks_per_node=2",
        "parallel.chunks=2",
        "parallel.backward_chunks=8",
    ],
    "padded": ["parallel.path=padded"],
    "sliced": ["parallel.ep=2", "parallel.expert_tp=2", "parallel.chunks=2"],
    "sliced_only": ["parallel.ep=1", "parallel.expert_tp=2"],
    "sliced_sharded": ["parallel.ep=1", "parallel.expert_tp=2", "optimizer.shard_experts=true"],
    "sliced_in_four": ["parallel.ep=1", "parallel.expert_tp=4", "parallel.chunks=4"],
    "sliced_on_nodes": [
        "parallel.ep=2",
        "parallel.expert_tp=2",
        "parallel.path=hierarchical",
        "parallel.ranks_per_node=2",
        "parallel.chunks=2",
        "parallel.backward_chunks=3",
    ],
    "sliced_to_all": ["parallel.ep=2", "parallel.expert_tp=2", "parallel.path=all_gather"],
    "copies": ["parallel.copies={experts: 3, when: always}", "parallel.chunks=2"],
    "moved": [
        "parallel.ep=2",
        "parallel.ranks_per_node=1",
        f"parallel.copies={{max_bytes: {2 * COPY_BYTES}, rematerialize: true, reshard_every: 1}}",
        "parallel.copies.when=always",
        "parallel.copies.plan=PLAN",
    ],
    "few_copies": [
        "parallel.path=hierarchical",
        "parallel.ranks_per_node=2",
        f"parallel.copies={{max_bytes: {2 * COPY_BYTES}, rematerialize: true, when: always}}",
    ],
}
AUTO = ["parallel.chunks=auto", "parallel.profile_every=1"]
PATHS["measured"] = ["parallel.chunks=auto", "parallel.path=auto", "parallel.ranks_per_node=2"]
PATHS["measured_copies"] = [*AUTO, "parallel.copies={}"]
CASES = [
    ("chunked", "plain"),
    ("gathered", "varying"),
    ("pipelined", "both"),
    ("pipelined", "lora"),
    ("measured", "both"),
    ("copies", "starved"),
    ("few_copies", "both"),
    ("moved", "starved"),
    ("moved", "sparsity"),
    ("padded", "limited"),
    ("sliced_only", "starved"),
    ("sliced", "both"),
    ("sliced_sharded", "frugal"),
    ("moved", "muon"),
]
MORE_CASES = [
    ("whole", "both"),
    ("gathered", "starved"),
    ("hierarchical", "both"),
    ("pipelined", "plain"),
    ("pipelined", "starved"),
    ("pipelined", "varying"),
    ("pipelined", "sparsity"),
    ("measured_copies", "both"),
    ("copies", "both"),
    ("copies", "sparsity"),
    ("few_copies", "varying"),
    ("moved", "both"),
    ("moved", "frugal"),
    ("padded", "chosen"),
    ("sliced", "biased"),
    ("sliced", "varying"),
    ("sliced", "router"),
    ("sliced_only", "biased"),
    ("sliced_in_four", "biased"),
    ("sliced_on_nodes", "both"),
    ("sliced_on_nodes", "biased"),
    ("sliced_to_all", "limited"),
]
"""Slow tests."""


@pytest.fixture(scope="module")
def out(tmp_path_factory, config_file):
    """Return the folder with the results of one process and of four ranks."""
    return compute(CASES, tmp_path_factory.mktemp("paths"), config_file)


@pytest.fixture(scope="module")
def more_out(tmp_path_factory, config_file):
    return compute(MORE_CASES, tmp_path_factory.mktemp("more-paths"), config_file)


def compute(chosen, out, config_file):
    """Run cases on one process and on four ranks, and return the folder with their results."""
    used = {like: LIKE[like] for _, like in chosen}
    run([sys.executable, WORKER, str(config_file), str(out), json.dumps(used)], 300)
    cases = {}
    for number, (path, like) in enumerate(chosen):
        dense = ("ddp", "fsdp")[number % 2]
        ranks = ["parallel.ep=4", f"parallel.dense={dense}"]
        apart = number % 3 == 0  # as on several hosts
        early = apart and dense == "ddp" and path != "padded"
        if early:
            ranks.append("parallel.gradient_slices=auto")
        overrides = [*LIKE[like]["overrides"], *ranks, *PATHS[path]]
        plan = out / f"{like}-plan.json"
        write_plan(plan, plan_of(PLANNED, model_of(like, config_file)))
        overrides = [override.replace("PLAN", str(plan)) for override in overrides]
        case = {"overrides": overrides, "apart": apart, "early": early}
        cases[f"{like}-{path}"] = LIKE[like] | case
    torchrun(4, WORKER, str(config_file), str(out), json.dumps(cases), timeout=600)
    return out


def model_of(like, config_file):
    config = read_run_config(config_file, LIKE[like]["overrides"])
    return fill_vocabulary(config, open_tokenizer(config.data.tokenizer))


def plan_of(owners_LE, model):
    """Return a plan for two ranks."""
    return PlanFile(
        architecture=identity_of(model).architecture,
        num_experts=4,
        ranks=2,
        ranks_per_node=2,
        kind="by hand",
        layers=tuple(
            LayerPlan(layer=layer, owner=owners_E, holders=tuple((owner,) for owner in owners_E))
            for layer, owners_E in enumerate(owners_LE)
        ),
    )


def test_a_plan_that_does_not_fit_the_run_is_refused(tmp_path, config_file):
    model, other = (model_of(like, config_file) for like in ("starved", "sparsity"))
    ranks = Mesh(world_size=2, ep_size=2)
    path = tmp_path / "plan.json"
    with pytest.raises(DataError, match=r"plan.json cannot be read: No such file"):
        planned_owners(path, model, ranks)
    write_plan(path, plan_of(PLANNED, model))
    owners = [placement.owner_E for placement in planned_owners(path, model, ranks)]
    assert tuple(owners) == PLANNED
    with pytest.raises(ConfigError, match=r"a plan for 2 ranks, but there are 4"):
        planned_owners(path, model, Mesh(world_size=4, ep_size=4))
    with pytest.raises(ConfigError, match=r"a plan for another model"):
        planned_owners(path, other, ranks)
    write_plan(path, plan_of((*PLANNED[:2], (1, 1, 1, 0)), model))
    with pytest.raises(ConfigError, match=r"gives rank 0 5 experts .* each rank of a run owns 6"):
        planned_owners(path, model, ranks)


@pytest.mark.dist
@pytest.mark.parametrize(("path", "like"), CASES, ids=str)
def test_equals_one_process_to_the_last_digits_in_fp64(out, path, like):
    check_equal(out, path, like)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("path", "like"), MORE_CASES, ids=str)
def test_also_equals_one_process(more_out, path, like):
    check_equal(more_out, path, like)


def check_equal(out, path, like):
    expected = gathered_from(out, like, 1)
    actual = gathered_from(out, f"{like}-{path}", 4)
    for a, e in zip(actual, expected, strict=True):
        assert a["counts"].equal(e["counts"])
        found = differences(a, e)
        # B begins at 0, so the first gradients of A are tiny, and AdamW divides them by themselves:
        # the last digits of gradients are digits of weights there.
        limit = 1e-11 if like == "lora" else 1e-12
        assert max(found.values()) <= limit, found


@pytest.mark.dist
def test_experts_really_began_as_planned_and_changed_their_owners(out):
    """Otherwise the cases above show nothing."""
    held = [torch.load(out / f"starved-moved-{rank}.pt") for rank in range(4)]
    first, last = (
        [sorted(k for k in steps[number]["weights"] if "experts" in k) for steps in held]
        for number in (0, -1)
    )
    for rank, keys in enumerate(first):
        found = {(int(layer), int(e)) for _, layer, _, _, e, _ in (key.split(".") for key in keys)}
        planned = {
            (layer, expert)
            for layer, owners in enumerate(PLANNED)
            for expert, owner in enumerate(owners)
            if owner == rank % 2
        }
        assert found == planned
    assert first != last and sum(map(len, first)) == sum(map(len, last))
    assert {len(keys) for keys in last} == {len(first[0])}


@pytest.mark.dist
def test_measured_chunks_are_the_same_on_all_ranks_and_their_times_are_recorded(out):
    name = "both-measured"
    ranks = [torch.load(out / f"{name}-{rank}.pt") for rank in range(4)]
    for step, *others in zip(*ranks, strict=True):
        chosen = step["schedule"]
        assert {chosen["chunks"], chosen["backward_chunks"]} <= {1, 2, 4, 8}
        for other in (step["schedule"] for step in others):
            same = {key: other[key] for key in ("path", "chunks", "backward_chunks", "r2")}
            assert same == {key: chosen[key] for key in same}
        for phase in ("forward", "backward"):
            compared = chosen["phases"][phase]
            assert compared["predicted_s"] > 0 and compared["measured_s"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.profile_every=5", "profile_every is 5, but parallel.chunks is 1"),
        ("parallel.backward_chunks=2 parallel.chunks=auto", "backward_chunks is 2.*chooses both"),
        ("parallel.copies={} parallel.ep=2 train.parameters=router", "only trained experts"),
        ("parallel.path=auto parallel.ep=2", "path is auto, but parallel.chunks is 1"),
        ("parallel.gradient_slices=auto parallel.ep=2 parallel.dense=fsdp", "dense is fsdp"),
        ("parallel.gradient_slices=auto", "gradient_slices is auto, but parallel.ep is 1"),
        ("parallel.chunks=auto parallel.ep=1", "parallel.chunks is auto, but parallel.ep is 1"),
    ],
)
def test_options_that_measure_nothing_are_refused(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        read_run_config(config_file, override.split())


def test_a_node_that_does_not_fold_is_refused():
    mesh = Mesh(world_size=4, ep_size=4, ep_group=cast(ProcessGroup, "a group"))
    with pytest.raises(ConfigError, match=r"3 ranks.*parallel.ep = 4"):
        open_path("hierarchical", Degrees(), 4, mesh, ranks_per_node=3, timeout_s=1)


def test_an_option_without_effect_is_refused(config_file):
    with pytest.raises(ConfigError, match=r"parallel.chunks is 2, but parallel.ep is 1"):
        read_run_config(config_file, ["parallel.chunks=2"])


def test_a_lane_runs_calls_in_order_and_hands_on_errors():
    lane, seen = Lane("test"), []
    first = lane.submit(lambda: time.sleep(0.01) or seen.append(1))
    wrong = lane.submit(lambda: 1 // 0)
    assert lane.submit(lambda: list(seen)).result() == [1] and first.done()
    with pytest.raises(ZeroDivisionError):
        wrong.result()


@pytest.mark.dist
@pytest.mark.slow
def test_a_resumed_run_makes_the_same_copies_and_bits(tmp_path, config_file):
    """Which rank computes a row decides how gradients round, so the load window must be saved."""
    options = [str(config_file), f"run_dir={tmp_path}/run", "parallel.ep=2"]
    options.append("parallel.copies={when: always}")
    torchrun(2, "-m", "moeyard.training", *options)
    steps = tmp_path / "run" / "checkpoints"
    expected = dict(StoredTensors(steps / "step-00000006"))
    shutil.rmtree(steps / "step-00000006")
    torchrun(2, "-m", "moeyard.training", *options)
    found = StoredTensors(steps / "step-00000006")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
