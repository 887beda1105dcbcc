"""``moeyard plan``, and the paragraph with which a command starts."""

import json
import shutil

import pytest

import moeyard
from moeyard.cli import main
from moeyard.moe.routes.recorder import recording
from moeyard.serving import memory
from moeyard.serving.planning import start

from small_model import CONFIG, NUM_EXPERTS, slots, write_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    write_random_model(path)
    return path


def plan(capsys, *arguments):
    status = main(["plan", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else None, captured.err


def test_a_plan_says_what_each_budget_means(folder, capsys):
    status, found, _ = plan(capsys, folder, "--max-model-len", 64, "--max-num-seqs", 3)
    assert status == 0 and found["runs_here"]
    assert found["room"]["kv_wanted_bytes"] == 3 * 64 * found["sizes"]["kv_bytes_per_token"]
    by_budget = {option["expert_memory"]: option for option in found["budgets"]}
    assert list(by_budget) == ["10%", "25%", "50%", "100%", "auto"]
    numbers = [option["num_slots"] for option in by_budget.values()]
    assert numbers == [1, 3, 6, NUM_EXPERTS, NUM_EXPERTS]
    speeds = [option["on_demand"] for option in by_budget.values()]
    assert speeds == sorted(speeds) and all(option["fits"] for option in by_budget.values())


def test_a_plan_keeps_what_is_asked_for_keys_and_values(folder, capsys):
    given = (folder, "--max-model-len", 64, "--max-num-seqs", 4, "--expert-memory", "50%")
    _, whole, _ = plan(capsys, *given)
    _, half, _ = plan(capsys, *given, "--kv-memory", "50%")
    _, rounded, _ = plan(capsys, *given, "--kv-dtype", "int8")
    wanted = [found["room"]["kv_wanted_bytes"] for found in (whole, half, rounded)]
    assert wanted[0] == wanted[1] > wanted[2] > wanted[0] / 4
    kept = [found["room"]["kv_bytes"] for found in (whole, half)]
    assert 0 < kept[1] < kept[0]
    needed = [found["budgets"][0]["needed_bytes"] for found in (whole, half)]
    assert needed[0] - needed[1] == kept[0] - kept[1]
    status, _, error = plan(capsys, *given, "--kv-memory", "1B")
    assert status == 2 and "one block of 16" in error and error.count("\n") == 1


def test_a_plan_as_text_says_that_speeds_are_bounds(folder, capsys):
    assert main(["plan", str(folder), "--expert-memory", "50%", "--host-memory", "25%"]) == 0
    text = capsys.readouterr().out
    (row,) = [line for line in text.splitlines() if line.startswith("50% ")]
    assert row.split()[1:3] == ["6", "50%"] and "tokens/s are upper bounds" in text


def test_recorded_routes_make_the_hit_rate(folder, tmp_path, capsys):
    routes = tmp_path / "r.routes"
    model = moeyard.load(folder, expert_memory=slots(6))
    with recording(model.decoder, routes, written_by="generate"):
        model.generate("hello", max_new_tokens=12, temperature=0)
    (_, layer), *_ = model.decoder.moe_layers()
    layers = layer.experts._store.statistics.layers.values()
    hits, misses = sum(t.hits for t in layers), sum(t.misses for t in layers)
    _, found, _ = plan(capsys, folder, "--expert-memory", "50%", "--routes", routes)
    (option,) = found["budgets"]
    assert option["bound"]["hit_rate"] == hits / (hits + misses)


def test_a_model_larger_than_memory_has_a_plan(folder, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 << 30)
    size = {"dense_bytes": 1 << 20, "num_experts": 1000, "expert_bytes": 10 << 20}
    monkeypatch.setattr(
        "moeyard.serving.planning.outlook.sizes_of", lambda *_: _larger(folder, **size)
    )
    status, found, _ = plan(capsys, folder, "--expert-memory", "auto", "--max-model-len", 64)
    (option,) = found["budgets"]
    assert status == 0 and option["fits"] and 0 < option["num_slots"] < 1000
    assert option["needed_bytes"] <= (3 << 30) - found["room"]["reserve_bytes"]


def _larger(folder, **size):
    from dataclasses import replace

    import torch

    from moeyard.moe.folders.folder import ModelFolder
    from moeyard.serving.planning.sizes import sizes_of

    return replace(sizes_of(ModelFolder(folder), torch.float32), **size)


def test_no_room_is_a_sentence_and_a_status(folder, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    status, found, error = plan(capsys, folder)
    assert status == 1 and not found["runs_here"]
    assert not any(option["fits"] for option in found["budgets"])
    assert error.startswith("error: expert-memory is auto, but 1 GiB of free memory leave no room")
    assert found["problem"] in error


@pytest.mark.parametrize("kind", ["nowhere", "dense", "damaged", "small_budget", "routes"])
def test_what_has_no_plan_is_one_sentence(folder, tmp_path, capsys, kind):
    path, more, message = tmp_path / "m", [], ""
    if kind == "nowhere":
        message = "does not exist; give a Hugging Face model folder"
    elif kind == "dense":
        write_random_model(path, CONFIG.model_copy(update={"moe": None}))
        message = "has no experts"
    elif kind == "damaged":
        shutil.copytree(folder, path)
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        message = "is cut short"
    else:
        path = folder
        more = ["--expert-memory", "1B"] if kind == "small_budget" else ["--routes", str(tmp_path)]
        message = "one expert takes" if kind == "small_budget" else "route"
    status, found, error = plan(capsys, path, *more)
    assert status in (1, 2) and found is None
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_command_with_a_budget_says_what_was_decided(folder, capsys, monkeypatch):
    monkeypatch.setattr(start.log, "handlers", [])
    assert main(["generate", str(folder), "ab", "--max-new-tokens", "2"]) == 0
    assert "experts" not in capsys.readouterr().err
    monkeypatch.setattr(start.log, "handlers", [])
    arguments = ["--max-new-tokens", "2", "--expert-memory", "25%"]
    assert main(["generate", str(folder), "ab", *arguments]) == 0
    text = capsys.readouterr().err
    assert "Memory holds 3 of 12 experts" in text and "Experts are read through" in text
    assert "The policy decayed_lfu" in text and "Upper bound for one request" in text
