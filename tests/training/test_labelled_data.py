"""Labelled texts: how they are read, held out, cut, and which are refused."""

import numpy as np
import pytest
import yaml

from moeyard.errors import DataError
from moeyard.moe.folders.text_marks import TextMarks
from moeyard.parallel.mesh import Mesh
from moeyard.training.data.labelled import build_labelled_data
from moeyard.training.data.labelled_records import LabelledFiles
from moeyard.training.data.labelled_texts import LabelledTexts, LabelledWriter
from moeyard.training.read_config import read_run_config

from labelled import ENCODER, records, write


def data_of(folder, *overrides):
    values = {
        "run_dir": str(folder / "run"),
        "model": ENCODER,
        "data": {"format": "classify", "eval_fraction": 0.2},
        "train": {"steps": 1, "sequence_length": 32},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return build_labelled_data(read_run_config(path, overrides), folder / "data", Mesh())


def test_texts_are_held_out_by_label_and_copies_are_not_trained_on(tmp_path):
    some = records(60)
    data = data_of(tmp_path, f"data.source={write(tmp_path / 't.jsonl', some + some[:20])}")
    held_out = data.held_out._labels_C
    assert np.bincount(held_out).min() >= 4  # of 60 texts whose labels take turns, every fifth
    train = {tuple(data.train.rows([n]).ids_N.tolist()) for n in range(len(data.train))}
    copies = {tuple(data.held_out.rows([n]).ids_N.tolist()) for n in range(len(held_out))}
    assert not train & copies


def test_long_texts_are_cut_and_counted(tmp_path):
    writer = LabelledWriter()
    for number, length in enumerate((2, 5, 9)):
        writer.add(np.arange(length, dtype=np.uint32), "ab"[number % 2])
    writer.write(tmp_path / "t.safetensors", ["a", "b"], "x")
    texts = LabelledTexts(tmp_path / "t.safetensors", TextMarks((20,), (21,)), 7, 2, seed=0)
    assert texts.facts.cut == 1 and texts.num_rows_of([0, 1, 2]) == [4, 7, 7]
    assert texts.rows([2, 0]).ids_N.tolist() == [20, 0, 1, 2, 3, 4, 21, 20, 0, 1, 21]
    assert texts.rows([2, 0]).lengths == (7, 4) and texts.rows([]).lengths == ()
    assert texts.token_counts() == [3, 3, 2, 2, 2, 1, 1, 1, 1, *[0] * 11, 3, 3]
    each = [sum(texts.num_rows_of(texts.at(step, range(2)))) for step in range(5)]
    assert texts.num_rows(range(1, 5)) == sum(each[1:])
    seen = [text for step in range(3) for text in texts.at(step, range(2))]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "a"}], "line 1 has nothing under 'label'; correct it or set data.label_key"),
        ([{"said": "a", "label": "b"}], "nothing under 'text'; correct it or set data.text_key"),
        ([{"text": "  ", "label": "b"}], "has the text '  '; give text that is not empty"),
        ([{"text": "a", "label": 0.5}], "has the label '0.5'; give a word or a whole number"),
        (["a"], "line 1 has nothing under 'text'"),
    ],
)
def test_records_that_say_nothing_are_refused(tmp_path, lines, message):
    path = write(tmp_path / "t.jsonl", lines)
    with pytest.raises(DataError, match=message):
        list(LabelledFiles(str(path), "data.source", "text", "label"))


def test_whole_numbers_are_labels_and_csv_and_json_say_the_same(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x, y", "label": 3}])
    (tmp_path / "b.csv").write_text('text,label\n"x, y",3\n')
    found = list(LabelledFiles(str(tmp_path), "data.source", "text", "label"))
    assert found == [("x, y", "3")] * 2 and path.exists()
    (tmp_path / "b.csv").write_text('text,label\n"x,3\n')
    with pytest.raises(DataError, match="is not a CSV table"):
        list(LabelledFiles(str(tmp_path), "data.source", "text", "label"))


def labelled(*labels):
    return [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (labelled(*"aaa"), labelled("a"), "all have the label 'a'; give texts of two labels"),
        (labelled(*"abab"), [{"text": "y", "label": "c"}], "the label 'c' is in the held-out"),
        (labelled("a"), labelled("a"), "leaves no text to train on"),
        (labelled(*"abab"), None, "leaves no text to hold out"),
    ],
)
def test_texts_that_cannot_be_learnt_from_are_refused(tmp_path, train, held_out, message):
    options = [f"data.source={write(tmp_path / 't.jsonl', train)}"]
    if held_out is not None:
        options.append(f"data.eval_source={write(tmp_path / 'e.jsonl', held_out)}")
    with pytest.raises(DataError, match=message):
        data_of(tmp_path, *options)
