"""Fine-tuning an encoder on labelled texts: the data, the loss, the measures, what comes out."""

import csv
import json
import shutil

import pytest
import torch
import transformers
import yaml

import moeyard
from moeyard.cli import main as command
from moeyard.errors import CheckpointError, ConfigError, DataError
from moeyard.moe.folders.families.bert import BERT
from moeyard.moe.routes.reader import read_routes
from moeyard.parallel.mesh import Mesh
from moeyard.serving.frozen_experts import open_frozen
from moeyard.training.checkpoints.export import export
from moeyard.training.data.tokenizer import ByteTokenizer
from moeyard.training.objectives.classify import macro_f1
from moeyard.training.on_paper import workload_of
from moeyard.training.read_config import complete_run_config, read_run_config
from moeyard.training.trainer import Trainer

from labelled import ENCODER, WORDS, records, write
from small_trainer import check_resumed, finished, metrics, trainer, write_config

TRAIN = {"steps": 6, "sequence_length": 32, "batch_sequences": 8, "eval_every": 3, "log_every": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    source = str(write(folder / "texts.jsonl"))
    data = {"format": "classify", "source": source, "eval_fraction": 0.2}
    return write_config(folder, model=ENCODER, data=data, train=TRAIN)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return finished(config, tmp_path_factory.mktemp("whole"), "monitor.routes={}")


def test_a_run_measures_what_it_learns_and_where_tokens_went(whole):
    last = metrics(whole[1])[-1]
    assert {"eval_loss", "eval_accuracy", "eval_macro_f1", "load"} <= last.keys()
    rows = whole[0].objective.num_tokens(range(5, 6))
    assert [sum(counts) for counts in last["expert_tokens"]] == [2 * rows] * 2


@pytest.mark.slow
def test_a_run_learns(config, tmp_path):
    longer = trainer(config, tmp_path / "longer", "train.steps=120", "train.eval_every=0")
    longer.run()
    last = metrics(tmp_path / "longer")[-1]
    assert last["eval_accuracy"] > 0.9 and last["loss"] < 0.3
    assert last["tokens"] == longer.objective.num_tokens(range(120))


def test_measures_are_those_of_the_held_out_texts(whole):
    run, run_dir = whole
    held_out = run._data.held_out
    labels, said, loss = [], [], 0.0
    for number in range(len(held_out)):
        rows = held_out.rows([number])
        with torch.no_grad():
            part = run.objective.module(run.decoder.eval())(rows)
        loss += float(part.loss_sum)
        labels.append(int(part.labels_B))
        said.append(int(part.said_B))
    last = metrics(run_dir)[-1]
    right = sum(map(int.__eq__, labels, said))
    assert last["eval_accuracy"] == right / len(labels)
    assert last["eval_loss"] == pytest.approx(loss / len(labels), rel=1e-5)


def test_macro_f1_is_the_mean_over_labels_that_occur():
    counts = torch.tensor([[3.0, 1, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    # Precision and recall: 3/6 and 3/4; 2/3 and 2/4; the third label never occurs; the last is 0.
    each = [2 * 0.5 * 0.75 / 1.25, 2 * (2 / 3) * 0.5 / (2 / 3 + 0.5), 0.0]
    assert macro_f1(counts) == pytest.approx(sum(each) / 3)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(config, whole, tmp_path):
    check_resumed(config, whole, tmp_path, "monitor.routes={}")


def test_export_reload_and_offload_are_the_same_bit_for_bit(whole, tmp_path):
    run, run_dir = whole
    export(run_dir, tmp_path / "model")
    model = moeyard.load_classifier(tmp_path / "model")
    assert model.labels == tuple(WORDS) and "labels: 3" in repr(model)
    some = [record["text"] for record in records(7)]
    found = model(some)
    for name, weight in run.decoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], weight), name
    own = run._data.tokenizer
    ids = [own.marks.around(own.encode(text).tolist(), 48) for text in some]
    shares = model.probabilities(ids)
    assert [list(one.probabilities.values()) for one in found] == shares.tolist()
    rows = torch.tensor([len(one) for one in ids])
    with torch.no_grad():
        batch = run.objective.batch(0, range(3), torch.device("cpu"))
        output = run.objective.module(run.decoder.eval())(batch)
    assert (
        output.said_B.tolist()
        == model.probabilities([one.tolist() for one in batch.ids_N.split(batch.lengths)])
        .argmax(dim=1)
        .tolist()
    )
    assert rows.max() <= 48
    small = moeyard.load_classifier(tmp_path / "model", expert_memory="30%")
    assert small(some) == found
    again = moeyard.load_classifier(tmp_path / "model", dtype="bf16")(some)
    assert again != found and again[0].probabilities.keys() == found[0].probabilities.keys()


def test_frozen_experts_may_stay_in_their_folder(config, whole, tmp_path):
    export(whole[1], tmp_path / "model")
    found = []
    for name, memory in (("all", []), ("half", ["train.expert_memory=50%"])):
        start = [f"start_from={tmp_path / 'model'}", "model={}", "train.parameters=router"]
        run_dir = tmp_path / name
        run_dir.mkdir()
        own = read_run_config(
            config, [f"run_dir={run_dir}", "data.tokenizer=null", *start, *memory]
        )
        run = Trainer(own, run_dir, Mesh(), open_source=open_frozen)
        found.append([run._step.run(step, False).loss for step in range(2)])
    assert found[0] == found[1]


def test_routes_of_a_run_have_every_row(whole):
    run, run_dir = whole
    routes = read_routes(run_dir / "routes")
    assert len(routes.rows.tokens_N if hasattr(routes, "rows") else routes.tokens_N) == (
        run.objective.num_tokens(range(6))
    )


def test_the_command_prints_a_line_for_each_text(whole, tmp_path, capsys):
    texts = tmp_path / "new.csv"
    with texts.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["id", "said"], [1, "salt, wave"], [2, "x" * 99]])
    run_dir = str(whole[1])
    assert command(["classify", run_dir, str(texts), "--text-key", "said"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [set(line) for line in lines] == [{"label", "probabilities"}] * 2
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert "event=cut texts=1 of=2" in err  # 32 tokens, as in the run's training
    assert command(["classify", run_dir, "--text", "salt, wave", "--text", "x" * 99]) == 0
    for line, alike in zip(capsys.readouterr().out.splitlines(), lines, strict=True):
        found = json.loads(line)["probabilities"]
        assert found == pytest.approx(alike["probabilities"], abs=1e-5)
    assert command(["classify", run_dir, "--text", " "]) == 2
    assert "text 0 is ' '; give text that is not empty" in capsys.readouterr().err
    assert command(["classify", run_dir]) == 2
    assert "give exactly one of them" in capsys.readouterr().err
    assert command(["classify", run_dir, str(tmp_path / "none.csv")]) == 2
    assert "which is not there; give another" in capsys.readouterr().err
    assert command(["classify", run_dir, str(texts)]) == 2
    assert "line 2 has no text under 'text'; correct it, or name" in capsys.readouterr().err


def test_a_decoder_cannot_classify(model_folder, capsys):
    assert command(["classify", str(model_folder), "--text", "x"]) == 2
    assert "has a decoder, but an encoder is needed" in (capsys.readouterr().err)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A small BERT for two labels that reads bytes."""
    path = tmp_path_factory.mktemp("bert") / "model"
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
        initializer_range=0.3,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    ByteTokenizer().save(path)
    return path


def test_a_folder_with_the_same_labels_goes_on_as_transformers_would(config, bert, tmp_path):
    said = [
        {"text": one["text"], "label": "yes" if "s" in one["text"] else "no"} for one in records()
    ]
    source = write(tmp_path / "texts.jsonl", said)
    start = [f"start_from={bert}", f"data.source={source}", "data.tokenizer=null"]
    run = trainer(config, tmp_path / "run", "model={}", *start)
    rows = run.objective.batch(0, range(8), torch.device("cpu"))
    wanted = transformers.BertForSequenceClassification.from_pretrained(bert)
    ids = rows.ids_N.split(rows.lengths)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(rows.lengths)[:, None]
    loss = wanted(padded, attention_mask=mask.long(), labels=rows.labels_C).loss
    assert run._step.run(0, False).loss == pytest.approx(float(loss.detach()), abs=1e-5)
    run.saves.save(1, must=True)
    export(tmp_path / "run", tmp_path / "out")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.id2label == {0: "no", 1: "yes"}
    for name, weight in run.decoder.state_dict().items():
        theirs = again.get_parameter(BERT.tensor_name(name))
        assert torch.equal(theirs, weight), name


def test_a_folder_for_other_labels_gets_a_new_head(config, bert, tmp_path, caplog):
    start = [f"start_from={bert}", "model={}", "data.tokenizer=null"]
    run = trainer(config, tmp_path / "run", *start)
    assert "knows no label 'sea', so a new head for the 3 labels of the data" in caplog.text
    assert run.decoder.config.labels == tuple(WORDS)
    head = run.decoder.classifier.weight
    assert head.shape == (3, 16) and 0.01 < head.std() < 0.03
    own = transformers.BertForSequenceClassification.from_pretrained(bert)
    assert torch.equal(run.decoder.pooler.weight, own.bert.pooler.dense.weight)


def test_labels_of_the_configuration_keep_their_order(config, tmp_path):
    run = trainer(config, tmp_path / "run", "model.labels=[wood, x, town, sea]")
    assert run._data.labels == tuple(WORDS) and run.decoder.config.labels[1] == "x"
    part = run.objective.module(run.decoder)(run._data.train.rows([0, 1, 2]))
    own = [run._data.train._labels_C[text] for text in (0, 1, 2)]
    assert part.labels_B.tolist() == [{0: 3, 1: 2, 2: 0}[int(label)] for label in own]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.format=text"], "data.format is text, which trains models of kind decoder, but"),
        (["model.labels=[sea, town]"], "model.labels has no 'wood', which is a label of the data"),
        (
            ["data.source=/none.jsonl"],
            "data.source is '/none.jsonl', which is not there; give",
        ),
        (["data.source=/etc/hostname"], "but data.format is classify; give a .jsonl"),
        (["train.parameters=lora"], "model.kind is encoder, whose weights have no low-rank"),
        (["parallel.pp=2"], "model.kind is encoder, which is not split into stages"),
        (["train.sequence_length=64"], "train.sequence_length is 64, but model.max_positions"),
    ],
)
def test_runs_that_cannot_work_are_refused(config, tmp_path, overrides, message):
    with pytest.raises((ConfigError, DataError), match=message):
        trainer(config, tmp_path / "run", *overrides)


def test_a_run_of_another_kind_of_model_is_not_resumed(config_file, whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    with pytest.raises(CheckpointError, match="kind = encoder, but the configuration says decoder"):
        trainer(config_file, tmp_path / "run").saves.resume()


def test_what_knows_decoders_alone_says_so(config, model_folder, tmp_path):
    encoder = read_run_config(config, [])
    with pytest.raises(ConfigError, match="kind is encoder, which simulate does not know"):
        workload_of(encoder)
    values = yaml.safe_load(config.read_text()) | {"start_from": str(model_folder)}
    with pytest.raises(ConfigError, match="kind is 'encoder', but start_from"):
        complete_run_config(values)
