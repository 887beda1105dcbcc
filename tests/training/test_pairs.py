"""Training on pairs of texts: the data, the loss, what comes out, and how it writes."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers

import moeyard
from moeyard.cli import main as command
from moeyard.errors import ConfigError, DataError
from moeyard.moe.batch import batch_of
from moeyard.moe.models.target_generation import TargetLimits, write_targets
from moeyard.parallel.mesh import Mesh
from moeyard.serving.frozen_experts import open_frozen
from moeyard.training.checkpoints.export import export
from moeyard.training.data.pair_records import PairFiles
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

from pairs import ENCODER_DECODER, pairs, write
from small_trainer import check_resumed, finished, metrics, trainer, write_config

TRAIN = {"steps": 6, "sequence_length": 12, "batch_sequences": 8, "eval_every": 3, "log_every": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    data = {"format": "pairs", "source": str(write(folder / "pairs.jsonl")), "eval_fraction": 0.2}
    return write_config(folder, model=ENCODER_DECODER, data=data, train=TRAIN)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return finished(config, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(whole[1], folder)
    return folder


def test_a_run_measures_what_it_learns_and_where_tokens_went(whole):
    run, run_dir = whole
    last = metrics(run_dir)[-1]
    assert {"eval_loss", "eval_accuracy", "load"} <= last.keys()
    assert last["moe_layers"] == [1, 3]
    rows = run._data.train.rows(run._data.train.at(5, range(8)))
    assert [sum(counts) for counts in last["expert_tokens"]] == [
        sum(rows.source_lengths),
        sum(rows.target_lengths),
    ]
    assert run.objective.num_tokens(range(5, 6)) == len(rows.source_ids_S) + len(rows.target_ids_T)


@pytest.mark.slow
def test_a_run_learns(config, tmp_path):
    more = ["train.steps=400", "train.eval_every=0", "model.d_model=32", "train.batch_sequences=32"]
    trainer(config, tmp_path / "longer", *more).run()
    assert metrics(tmp_path / "longer")[-1]["loss"] < 0.5


@torch.no_grad()
def test_the_loss_is_that_of_each_target_behind_its_start(whole):
    run, run_dir = whole
    held_out, model = run._data.held_out, run.decoder.eval()
    loss, right, count = 0.0, 0, 0
    for number in range(len(held_out)):
        rows = held_out.rows([number])
        assert rows.source_ids_S[-1] == rows.target_ids_T[-1] == 256
        hidden = model.encode(batch_of([rows.source_ids_S])).hidden_TD
        read = torch.cat([torch.tensor([256]), rows.target_ids_T[:-1]])
        output = model.decode(batch_of([read]), hidden, rows.source_lengths)
        logits = model.logits(output.hidden_TD)
        loss += float(F.cross_entropy(logits, rows.target_ids_T, reduction="sum"))
        right += int((logits.argmax(dim=1) == rows.target_ids_T).sum())
        count += len(logits)
    last = metrics(run_dir)[-1]
    assert last["eval_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert last["eval_accuracy"] == pytest.approx(right / count)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(config, whole, tmp_path):
    check_resumed(config, whole, tmp_path)


def test_export_reload_and_offload_are_the_same_bit_for_bit(whole, exported):
    run, model = whole[0], moeyard.load_seq2seq(exported)
    assert "4 of them" not in repr(model) and "2 of them with experts" in repr(model)
    for name, weight in run.decoder.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight), name
    some = [pair["source"] for pair in pairs(5)]
    own = run._data.tokenizer
    sources = [[*own.encode(text).tolist(), own.eos_id] for text in some]
    for beams in (1, 3):
        limits = TargetLimits(6, beams, 1.0, {own.eos_id})
        wanted = write_targets(run.decoder.eval(), sources, limits)
        found = model(some, 6, beams)
        assert [one.score for one in found] == [one[0].score for one in wanted]
        small = moeyard.load_seq2seq(exported, expert_memory="30%")
        assert "of the experts are on disk" in repr(small)
        assert small(some, 6, beams) == found
    again = moeyard.load_seq2seq(exported, dtype="bf16")(some, 6)
    assert [one.score for one in again] != [one.score for one in model(some, 6)]


def test_the_export_opens_in_transformers_and_writes_the_same(exported):
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported)
    model = moeyard.load_seq2seq(exported)
    ids = [*model.tokenizer("abc")["input_ids"], 256]
    wanted = theirs.generate(torch.tensor([ids]), max_new_tokens=6, num_beams=3, do_sample=False)
    found = model(["abc"], 6, beams=3)[0]
    assert model.tokenizer.decode(wanted[0], skip_special_tokens=True) == found.text


def test_a_native_folder_is_read_back(config, tmp_path):
    run = trainer(config, tmp_path / "run", "model.moe.activation=swiglu", "train.steps=1")
    run.run()
    export(tmp_path / "run", tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["model_type"] == "moeyard" and values["eos_token_id"] == 256
    model = moeyard.load_seq2seq(tmp_path / "model")
    for name, weight in run.decoder.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight), name


def test_training_goes_on_from_a_folder_also_with_frozen_experts_there(config, exported, tmp_path):
    found = []
    for name, memory in (("all", []), ("half", ["train.expert_memory=50%"])):
        start = [f"start_from={exported}", "model={}", "train.parameters=router"]
        (tmp_path / name).mkdir()
        own = read_run_config(
            config, [f"run_dir={tmp_path / name}", "data.tokenizer=null", *start, *memory]
        )
        run = Trainer(own, tmp_path / name, Mesh(), open_source=open_frozen)
        found.append([run._step.run(step, False).loss for step in range(2)])
    assert found[0] == found[1]


def test_the_command_prints_a_line_for_each_text(whole, exported, tmp_path, capsys):
    texts = write(tmp_path / "new.jsonl", [{"said": "abc"}, {"said": "x" * 20}])
    run_dir = str(whole[1])
    assert command(["translate", run_dir, str(texts), "--text-key", "said", "--beams", "2"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [set(line) for line in lines] == [{"text", "score", "is_ended"}] * 2
    assert "event=cut texts=1 of=2" in err  # 12 tokens, as in the run's training
    small = ["--expert-memory", "30%", "--max-new-tokens", "12", "--beams", "2"]
    assert command(["translate", str(exported), "--text", "abc", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == lines[0]["text"]
    assert found["score"] == pytest.approx(lines[0]["score"], abs=1e-5)
    for wrong, message in (
        (["--text", " "], "text 0 is ' '; give text that is not empty"),
        ([], "give exactly one of them"),
        ([str(tmp_path / "none.csv")], "which is not there; give another"),
        ([str(texts)], "line 1 has no text under 'source'; correct it, or name"),
        (["--text", "a", "--beams", "0"], "beams is 0; use a whole number from 1"),
        (["--text", "a", "--length", "99"], "length is 99; use a number from 2 to 48"),
    ):
        assert command(["translate", str(exported), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_decoder_cannot_translate(model_folder, capsys):
    assert command(["translate", str(model_folder), "--text", "x"]) == 2
    assert "has a decoder, but an encoder-decoder of texts is needed" in capsys.readouterr().err


def test_pairs_are_cut_held_out_and_deterministic(config, whole, tmp_path):
    data = whole[0]._data
    assert len(data.held_out) == 12 and len(data.train) == 48
    train = [data.train.rows([n]).source_ids_S.tolist() for n in range(48)]
    assert not [n for n in range(12) if data.held_out.rows([n]).source_ids_S.tolist() in train]
    rows = data.train.rows([0, 1])
    assert rows.source_lengths == tuple(map(len, train[:2]))
    short = trainer(config, tmp_path / "run", "train.sequence_length=4")
    cut = short._data.train.rows([0])
    assert cut.source_lengths == (4,) and cut.source_ids_S.tolist() == [*train[0][:3], 256]
    assert short._data.train.facts.cut == sum(len(one) > 4 for one in train)
    each = [len(data.train.rows(data.train.at(s, range(8))).target_ids_T) for s in range(9)]
    assert [whole[0].objective.divisor(step) for step in range(9)] == each
    counts = data.train.token_counts()
    assert counts[256] == 2 * 48 and counts[ord(" ")] == 2 * 48


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"source": "a"}], "line 1 has nothing under 'target'; correct it or set data.target_key"),
        ([{"target": "a"}], "line 1 has nothing under 'source'; correct it or set data.source_key"),
        ([{"source": " ", "target": "b"}], "has ' ' under 'source'; give text that is not empty"),
        ([{"source": "a", "target": 3}], "has '3' under 'target'; give text that is not empty"),
        (["a"], "line 1 has nothing under 'source'"),
    ],
)
def test_records_that_are_no_pairs_are_refused(tmp_path, lines, message):
    path = write(tmp_path / "p.jsonl", lines)
    with pytest.raises(DataError, match=message):
        list(PairFiles(str(path), "data.source", "source", "target"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data={format: text}"], "data.format is text, which trains models of kind decoder, but"),
        (
            ["data.source=/none.jsonl"],
            "data.source is '/none.jsonl', which is not there; give",
        ),
        (["data.source=/etc/hostname"], "but data.format is pairs; give a .jsonl"),
        (["data.eval_fraction=0.001"], "leaves no pair to hold out; give more of them"),
        (["train.sequence_length=1"], "train.sequence_length is 1, which leaves no room"),
        (["train.sequence_length=64"], "train.sequence_length is 64, but model.max_positions"),
        (["train.parameters=lora"], "model.kind is encoder_decoder, whose weights have no low"),
        (["parallel.pp=2"], "model.kind is encoder_decoder, which is not split into stages"),
        (["monitor.routes={}"], "monitor.routes is given, but in a model of kind encoder_decoder"),
        (["model.moe.router={kind: task, k: 1, num_tasks: 2}"], "rows of this model have none"),
    ],
)
def test_runs_that_cannot_work_are_refused(config, tmp_path, overrides, message):
    with pytest.raises((ConfigError, DataError), match=message):
        trainer(config, tmp_path / "run", *overrides)
