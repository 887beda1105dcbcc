"""Runs that learn to generate sessions: loss, measures, checkpoints, exports, preferences."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import moeyard
from moeyard.cli import main as command
from moeyard.errors import ConfigError, DataError
from moeyard.training.checkpoints.export import export
from moeyard.training.data.session_pairs import SessionPairs, write_pairs

import clicks
from small_trainer import check_resumed, finished, metrics, trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    (folder / "run.yaml").write_text(yaml.safe_dump(clicks.write(folder)))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return finished(config, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export(whole[1], folder)
    return folder


def test_a_run_measures_sessions_and_where_their_tokens_went(whole):
    run, last = whole[0], metrics(whole[1])[-1]
    assert {"eval_loss", "eval_recall", "load"} <= last.keys()
    rows = run._data
    chosen = rows.train.at(3, range(8))
    sources = sum(rows.train.rows(chosen).lengths)
    decoded = 8 * (3 * 4 - 1)
    assert [sum(counts) for counts in last["expert_tokens"]] == [
        2 * sources,
        2 * decoded,
        2 * decoded,
    ]
    assert last["step_tokens"] == sources + decoded


def test_measures_are_those_of_the_held_out_sessions(whole):
    run, data = whole[0], whole[0]._data
    model = run.decoder.eval()
    losses, shares = 0.0, []
    for one in range(len(data.held_out)):
        batch = run.objective.batch(0, range(1), torch.device("cpu"))._replace(
            sessions=data.held_out.rows([one])
        )
        with torch.no_grad():
            part = run.objective.module(model).eval()(batch)
        losses += float(part.loss_sum) / part.num_targets
        wanted = set(data.held_out.sessions.items_CI[one].tolist())
        found = set(part.generated.best_items(0, 5))
        shares.append(len(wanted & found) / len(wanted))
    last = metrics(whole[1])[-1]
    assert last["eval_loss"] == pytest.approx(losses / len(shares), rel=1e-5)
    assert last["eval_recall"] == pytest.approx(sum(shares) / len(shares))


@pytest.mark.slow
def test_a_run_learns(config, tmp_path):
    trainer(config, tmp_path / "run", "train.steps=150").run()
    last = metrics(tmp_path / "run")[-1]
    assert last["loss"] < 0.8 * math.log(13)  # less than one of 13 tokens by chance


def test_a_resumed_run_ends_as_one_that_was_not_stopped(config, whole, tmp_path):
    check_resumed(config, whole, tmp_path)


def some_histories(run):
    data = run._data
    return [
        [data.table.names[item] for item in data.held_out.history(one)]
        for one in range(min(6, len(data.held_out)))
    ]


def test_exports_carry_the_items_and_recommend_the_same(whole, exported):
    run = whole[0]
    model = moeyard.load_recommender(exported)
    assert model.items.names == run._data.table.names and model.shape == (3, 10)
    assert "items: 30, 3 codes each" in repr(model)
    for name, weight in run.decoder.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight), name
    histories = some_histories(run)
    found = model(histories, k=5, beams=3)
    batch = run.objective.batch(0, range(1), torch.device("cpu"))
    rows = run._data.held_out.rows(range(len(histories)))
    with torch.no_grad():
        part = run.objective.module(run.decoder).eval()(batch._replace(sessions=rows))
    for user, one in enumerate(found):
        items = part.generated.best_items(user, 5)
        assert one.items == tuple(model.items.names[item] for item in items)
    again = model(histories[:1], k=5, beams=3)[0]
    assert again.items == found[0].items and again.log_prob == pytest.approx(found[0].log_prob)


def test_experts_on_disk_give_the_same_bits(whole, exported):
    histories = some_histories(whole[0])
    found = moeyard.load_recommender(exported)(histories, k=5, beams=3)
    small = moeyard.load_recommender(exported, expert_memory="30%")
    assert small(histories, k=5, beams=3) == found


def test_the_command_prints_a_line_for_each_user(whole, exported, tmp_path, capsys):
    histories = some_histories(whole[0])
    lines = [{"user": user, "items": items} for user, items in enumerate(histories)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = ["user,item", *(f"{line['user']},{item}" for line in lines for item in line["items"])]
    (tmp_path / "x.csv").write_text("\n".join(rows) + "\n")
    options = ["-k", "4", "--beams", "3"]
    printed = []
    on_disk = ["--expert-memory", "30%"]
    for model, name, extra in ((whole[1], "x.jsonl", []), (exported, "x.csv", on_disk)):
        assert command(["recommend", str(model), str(tmp_path / name), *options, *extra]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    found = [json.loads(line) for line in printed[0].splitlines()]
    assert [line["user"] for line in found] == [str(line["user"]) for line in lines]
    wanted = moeyard.load_recommender(exported)(histories, k=4, beams=3)
    assert [tuple(line["items"]) for line in found] == [one.items for one in wanted]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            '{"user": 1, "items": ["i1", "x"]}',
            [],
            "has the item 'x', which the model does not know",
        ),
        ('{"user": 1, "items": []}', [], "line 1 has the items []; give a list of one or more"),
        ('{"user": 1}', [], "line 1 has no user and items; correct it"),
        ('{"user": 1, "items": ["i1"]}\n' * 2, [], "line 2 has the user '1' again; give each"),
        ("x", [], "line 1 is not JSON; correct it"),
        ("", [], "has no user; give a file with some"),
        ('{"user": 1, "items": ["i1"]}', ["-k", "99"], "k is 99, but 8 beams with 3 items each"),
        ('{"user": 1, "items": ["i1"]}', ["-k", "0"], "-k is 0 and --beams is 8; use numbers"),
    ],
)
def test_histories_that_cannot_be_used_are_refused(
    exported, tmp_path, capsys, lines, options, message
):
    (tmp_path / "x.jsonl").write_text(lines)
    assert command(["recommend", str(exported), str(tmp_path / "x.jsonl"), *options]) == 2
    assert message in capsys.readouterr().err


def test_other_models_do_not_recommend(model_folder, exported, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"user": 1, "items": ["i1"]}')
    assert command(["recommend", str(model_folder), str(tmp_path / "x.jsonl")]) == 2
    assert "has a decoder, but a recommender of sessions is needed" in (capsys.readouterr().err)
    with pytest.raises(ConfigError, match="use moeyard recommend or moeyard"):
        moeyard.load_seq2seq(exported)


@pytest.fixture(scope="module")
def pairs(whole, tmp_path_factory):
    """Pairs of made-up sessions, for five training rows, from the model at the end of the run."""
    data, run = whole[0]._data, whole[0]
    draws = torch.Generator().manual_seed(0)
    items_P2I = torch.stack([torch.randperm(30, generator=draws)[:3] for _ in range(10)])
    items_P2I = items_P2I.unflatten(0, (5, 2))
    sessions = torch.arange(5)
    found = SessionPairs(
        sessions, items_P2I, torch.zeros(5, 2, dtype=torch.float64), torch.zeros(5, 2).double()
    )
    module = run.objective.module(run.decoder).eval()
    for place in range(5):
        rows = data.train.rows([place] * 2)._replace(
            targets_BIL=data.table.tokens(items_P2I[place])
        )
        with torch.no_grad():
            batch = run.objective.batch(0, range(1), torch.device("cpu"))
            part = module(batch._replace(sessions=rows))
        found.reference_P2[place] = part.log_probs_B.double()
    path = tmp_path_factory.mktemp("pairs") / "pairs.safetensors"
    write_pairs(path, found, data.train)
    return path


def aligned(config, exported, run_dir, pairs, *overrides):
    start = [f"start_from={exported}", "model={}", "train.batch_sequences=16", "train.steps=2"]
    start.append("train.eval_sequences=1")
    section = [f"data.alignment.pairs={pairs}"] if pairs else []
    return trainer(config, run_dir, *start, *section, *overrides)


def test_preferences_of_weight_0_change_no_bit(config, exported, pairs, tmp_path):
    plain = aligned(config, exported, tmp_path / "plain", None)
    zero = aligned(config, exported, tmp_path / "zero", pairs, "data.alignment.weight=0")
    some = aligned(config, exported, tmp_path / "some", pairs, "data.alignment.weight=1")
    for run in (plain, zero, some):
        run.run()
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "zero")]
    assert losses[0] == losses[1]
    for name, weight in plain.decoder.state_dict().items():
        assert torch.equal(zero.decoder.state_dict()[name], weight), name
    states = (plain.decoder.state_dict(), some.decoder.state_dict())
    assert any(not torch.equal(states[1][name], weight) for name, weight in states[0].items())


def test_a_run_goes_on_with_the_pairs_that_it_began_with_only(config, exported, pairs, tmp_path):
    weight = "data.alignment.weight=1"
    before = aligned(config, exported, tmp_path / "run", pairs, weight)._data
    with safe_open(pairs, "pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    parts["reference_P2"] = parts["reference_P2"] - 1
    save_file(parts, tmp_path / "others.safetensors", metadata)
    others = tmp_path / "others.safetensors"
    assert (
        aligned(config, exported, tmp_path / "b", others, weight)._data.identity != before.identity
    )
    again = aligned(config, exported, tmp_path / "c", pairs, "data.alignment.weight=2")._data
    assert again.identity != before.identity
    plain = aligned(config, exported, tmp_path / "d", None)._data
    assert plain.identity == before.train.identity != before.identity


def test_a_folder_in_fewer_bits_still_recommends(whole, exported, tmp_path):
    assert command(["convert", str(exported), str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    found = moeyard.load_recommender(tmp_path / "bf16")
    assert found.items.names == whole[0]._data.table.names and found.shape == (3, 10)


def test_the_model_that_made_the_pairs_pays_log_2_for_each(config, exported, pairs, tmp_path):
    run = aligned(config, exported, tmp_path / "run", pairs, "data.alignment.weight=7")
    batch = run.objective.batch(0, range(16), torch.device("cpu"))
    count = len(batch.pairs.rows_P)
    assert 0 < count <= 5
    module = run.objective.module(run.decoder)
    both, alone = module(batch), module(batch._replace(pairs=None))
    added = float((both.loss_sum - alone.loss_sum).detach()) / 7
    assert added == pytest.approx(count * math.log(2), rel=1e-4)
    # Each pair follows the history of its own row.
    chosen = run._data.train.at(0, range(16))
    own = [chosen[row] for row in batch.pairs.rows_P.tolist()]
    assert own == [one for one in chosen if one < 5]
    # Other references make the policy's margin: the worse session is now thought too likely.
    reference = batch.pairs.reference_2P.clone()
    reference[count:] += 30
    apart = module(batch._replace(pairs=batch.pairs._replace(reference_2P=reference)))
    margin = 0.1 * 30
    wanted = count * math.log1p(math.exp(-margin))
    assert float((apart.loss_sum - alone.loss_sum).detach()) / 7 == pytest.approx(wanted, rel=1e-3)


def test_pairs_that_do_not_fit_are_refused(config, exported, pairs, tmp_path):
    with pytest.raises(DataError, match=r"which has no pairs .*; give a file that moeyard align"):
        aligned(config, exported, tmp_path / "none", tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="whose pairs are of other sessions; write them again"):
        aligned(config, exported, tmp_path / "other", pairs, "train.sequence_length=27")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vocab_size=99"], "model.vocab_size is 99, but .* has 3 levels of 4 codes, which"),
        (["data.format=text"], "not a known key|data"),
        (
            ["data.session_items=4", "train.sequence_length=9", "model.max_positions=15"],
            "which are 16 tokens, but model.max_positions is 15; lower the one",
        ),
        (["train.parameters=lora"], "encoder_decoder, whose weights have no low-rank updates"),
        (["parallel.pp=2"], "not split into stages"),
    ],
)
def test_runs_that_cannot_work_are_refused(config, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        trainer(config, tmp_path / "run", *overrides)


def test_the_report_and_the_metrics_show_recall_and_expert_load(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole[1], run_dir)
    assert command(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert "Items of held-out sessions that were recommended" in page and "layer 3" in page.lower()
