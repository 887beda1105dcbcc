"""Plans over recorded routes: what is compared, what is written, what is refused."""

import json

import numpy as np
import pytest
import torch

from moeyard.cli import main
from moeyard.errors import ConfigError, DataError
from moeyard.moe.folders.hf_config import from_hf
from moeyard.moe.routes.format import make_header
from moeyard.moe.routes.identity import ModelIdentity, identity_of
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.rows import Routes
from moeyard.moe.routes.writer import RouteWriter
from moeyard.parallel.planning.from_routes import RecordedLoads, judge, make_plans
from moeyard.parallel.planning.placement import Placement, Topology
from moeyard.parallel.planning.plan_file import read_plan
from moeyard.parallel.planning.shadow import ShadowCosts

EXPERTS = 6  # as the small model has


@pytest.fixture
def config(model_folder):
    return from_hf(json.loads((model_folder / "config.json").read_text()))


def routes_of(steps, layers, num_experts=EXPERTS, rows=60, seed=0):
    """Rows whose experts follow a Zipf law, in another order in each layer."""
    draw = np.random.default_rng(seed)
    chance_E = 1 / np.arange(1, num_experts + 1)
    orders = [draw.permutation(num_experts) for _ in range(layers)]
    picked_NLK = draw.choice(num_experts, (rows * steps, layers, 2), p=chance_E / chance_E.sum())
    for layer, order in enumerate(orders):
        picked_NLK[:, layer] = order[picked_NLK[:, layer]]
    number = rows * steps
    return Routes(
        tokens_N=np.zeros(number, dtype=np.int32),
        sequences_N=np.zeros(number, dtype=np.int64),
        positions_N=np.arange(number, dtype=np.int32),
        steps_N=np.repeat(np.arange(steps, dtype=np.int64), rows),
        phases_N=np.zeros(number, dtype=np.uint8),
        experts_NLK=picked_NLK.astype(np.int32),
    )


def write_routes(path, routes, identity, layers, num_experts=EXPERTS):
    header = make_header(identity, layers, num_experts, 2, weights=False, written_by={})
    writer = RouteWriter(path, header)
    writer.add(routes)
    writer.close()
    return path


@pytest.fixture
def route_file(tmp_path, config):
    """Recorded routes of the small model: five steps, one of them the middle one."""
    layers = config.moe_layers
    routes = routes_of(5, len(layers))
    return write_routes(tmp_path / "a.routes", routes, identity_of(config), layers)


def test_loads_are_split_in_the_middle_of_the_steps(route_file):
    file = RouteFile(route_file)
    loads = RecordedLoads.of([file])
    rows = file.read()
    assert (loads.early_steps, loads.late_steps) == (3, 2)
    for layer in range(2):
        for half, chosen in ((loads.early_LE, rows.steps_N < 3), (loads.late_LE, rows.steps_N > 2)):
            ids = rows.experts_NLK[chosen, layer].ravel()
            expected = np.bincount(ids[ids >= 0], minlength=EXPERTS)
            assert half[layer].tolist() == expected.tolist()


def test_one_step_has_nothing_to_judge_later(tmp_path):
    path = tmp_path / "a.routes"
    routes = routes_of(1, 2)
    routes.experts_NLK[:30] = -1
    write_routes(path, routes, ModelIdentity(architecture="x"), (0, 1))
    loads = RecordedLoads.of([RouteFile(path)])
    assert (loads.early_steps, loads.late_steps) == (1, 0)
    assert loads.early_LE.sum() == 30 * 2 * 2 and loads.late_LE.sum() == 0
    write_routes(path, routes.select(slice(0)), ModelIdentity(architecture="x"), (0, 1))
    with pytest.raises(DataError, match="has no rows"):
        RecordedLoads.of([RouteFile(path)])


@pytest.mark.parametrize("topology", [Topology(4, 4), Topology(4, 2), Topology(5, 1)], ids=str)
def test_no_plan_is_less_even_than_contiguous_and_budgets_hold(topology):
    draw = torch.Generator().manual_seed(1)
    load_LE = torch.stack(
        [(9e5 / torch.arange(1, 21))[torch.randperm(20, generator=draw)].long() for _ in range(3)]
    )
    costs = ShadowCosts.of_sizes(64, 128, flops_per_s=1e12, bytes_per_s=1e10)
    plans = make_plans(load_LE, topology, [1, 3], (costs, 10))
    kinds = [(plan.kind, plan.budget) for plan in plans]
    expected = [("contiguous", 0), ("hecate", 0), ("replicate", 0)]
    for copies in (1, 3):
        expected += [(kind, copies) for kind in ("materialize", "hecate", "replicate")]
    assert kinds == [*expected, ("shadow", None)]
    shares = {}
    for plan in plans:
        found = judge(plan, load_LE, 10, topology)
        shares[plan.kind, plan.budget] = found.share
        for placement in plan.placements_L:
            held = [len(placement.held_by(rank)) for rank in range(topology.num_ranks)]
            if plan.kind == "replicate":
                assert max(held) <= 20 // topology.num_ranks + plan.budget
            elif plan.budget is not None:
                assert max(placement.copies_R()) <= plan.budget
        assert found.crossing <= found.moving <= 1 and found.share <= found.worst_share + 1e-9
    # Rows are whole, so equal shares differ a little.
    assert all(share <= shares["contiguous", 0] + 1e-3 for share in shares.values())
    assert shares["hecate", 3] <= shares["materialize", 3] + 1e-3
    assert shares["hecate", 3] < 1.2 < shares["contiguous", 0]
    assert plans[0].moved == 0 and plans[1].moved > 0
    assert make_plans(load_LE, topology, [1, 3], (costs, 10)) == plans


def test_replication_needs_slots_for_all_experts_and_keeps_to_its_copies():
    load_LE = torch.tensor([[50, 3, 20, 1, 9, 2]])
    plans = make_plans(load_LE, Topology.one_node(4), [1])
    kinds = [(plan.kind, plan.budget) for plan in plans]
    assert ("replicate", 0) not in kinds and ("replicate", 1) in kinds
    for plan in plans:
        held = [len(plan.placements_L[0].held_by(rank)) for rank in range(4)]
        assert plan.kind != "replicate" or max(held) <= 6 // 4 + 1


def test_the_command_prints_a_table_and_writes_a_plan_that_is_read_back(
    route_file, model_folder, config, tmp_path, capsys
):
    out = tmp_path / "plan.json"
    command = ["trace", "place", str(route_file), "--ranks", "4", "--ranks-per-node", "2"]
    command += ["--model", str(model_folder), "--copies", "3kb", "50%", "--shadow", "1e12", "1e9"]
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "ranks=4 nodes=2 experts=6 layers=2 steps=3+2 expert_bytes=2880\n" in said
    lines = [line.split() for line in said.splitlines()]
    table = {(line[0], line[1]): line for line in lines if len(line) == 10}
    assert {("contiguous", "0"), ("materialize", "1"), ("materialize", "3")} <= table.keys()
    plan = read_plan(out, config, num_ranks=4)
    assert f"plan file={out} kind={plan.kind} share=" in said
    assert list(plan.placements()) == config.moe_layers and plan.topology == Topology(4, 2)

    assert main([*command, "--kind", "contiguous", "--out", str(out), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["placements"]
    assert {"contiguous", "hecate", "replicate", "materialize", "shadow"} == {
        value["kind"] for value in values
    }
    assert set(read_plan(out).placements().values()) == {Placement.contiguous(6, 4)}


def test_without_a_model_the_command_counts_rows(route_file, capsys):
    assert main(["trace", "place", str(route_file), "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert "link: rows of the busiest rank" in said and "copied" not in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ranks", "7"], "the number of ranks is 7, but a layer has 6 expert(s)"),
        (["--ranks", "4", "--ranks-per-node", "3"], "the ranks of a node are 3"),
        (["--ranks", "2", "--copies", "1GB"], "--copies and --shadow need the size of an expert"),
        (["--ranks", "2", "--model", "M", "--copies", "2kb"], "is 2000 bytes, but one expert has"),
        (["--ranks", "2", "--model", "M", "--copies", "x"], "--copies is 'x'; write a size"),
        (["--ranks", "2", "--model", "M", "--shadow", "0", "1"], "--shadow is 0 1; both must be"),
        (["--ranks", "2", "--out", "O", "--kind", "best"], "--kind is 'best'; use one of contig"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    route_file, model_folder, tmp_path, capsys, options, sentence
):
    names = {"M": str(model_folder), "O": str(tmp_path / "plan.json")}
    given = [names.get(option, option) for option in options]
    assert main(["trace", "place", str(route_file), *given]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()


def test_routes_of_another_model_are_refused(tmp_path, model_folder, config, capsys):
    other = ModelIdentity(architecture="another")
    layers = config.moe_layers
    path = write_routes(tmp_path / "b.routes", routes_of(1, len(layers)), other, layers)
    assert main(["trace", "place", str(path), "--ranks", "2", "--model", str(model_folder)]) == 2
    said = capsys.readouterr().err
    assert "belongs to another model" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"ranks": 3}, DataError, "is not a plan"),
        ({"version": 2}, DataError, "is not a plan (version"),
        ({"num_experts": 7}, DataError, "a layer has 6 experts, not 7"),
        ({"ranks_per_node": 3}, DataError, "the ranks of a node are 3"),
        ({"architecture": "another"}, ConfigError, "is a plan for another model"),
        ({"num_ranks": 8}, ConfigError, "is a plan for 4 ranks, but there are 8"),
        ({"text": "{"}, DataError, "is not a plan; make it with"),
    ],
)
def test_a_damaged_or_foreign_plan_is_refused(
    route_file, config, tmp_path, capsys, change, error, sentence
):
    out = tmp_path / "plan.json"
    assert main(["trace", "place", str(route_file), "--ranks", "4", "--out", str(out)]) == 0
    num_ranks = change.pop("num_ranks", 4)
    text = change.pop("text", None) or json.dumps({**json.loads(out.read_text()), **change})
    out.write_text(text)
    with pytest.raises(error) as raised:
        read_plan(out, config, num_ranks)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
