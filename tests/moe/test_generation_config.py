"""A folder's sampling defaults, and a caller's overrides."""

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeyard
from moeyard.errors import ModelFileError
from moeyard.moe.folders.convert import convert
from moeyard.serving.api.completions import CompletionRequest
from moeyard.serving.api.protocol import sampling_of

from hf_families import save


def load_with(folder, **values):
    save("mixtral", folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return moeyard.load(folder)


def test_the_file_says_how_to_sample_unless_the_caller_does(tmp_path):
    model = load_with(tmp_path, do_sample=True, temperature=0.5, top_p=0.9, top_k=7)
    assert (model.sampling.temperature, model.sampling.top_p, model.sampling.top_k) == (0.5, 0.9, 7)
    body = {"model": "m", "prompt": "x", "temperature": 0.0}
    found = sampling_of(CompletionRequest(**body), model.sampling)
    assert (found.temperature, found.top_p, found.top_k) == (0.0, 0.9, 7)
    ids = torch.arange(5).unsqueeze(0)
    drawn = {tuple(model.generate(ids, 6, seed=seed)[0].tolist()) for seed in range(8)}
    greedy = {
        tuple(model.generate(ids, 6, temperature=0, seed=seed)[0].tolist()) for seed in (1, 2)
    }
    assert len(drawn) > 1 and len(greedy) == 1


def test_do_sample_false_is_greedy_whatever_else_is_there(tmp_path):
    assert load_with(tmp_path, do_sample=False, temperature=0.5).sampling.temperature == 0


def test_what_is_not_offered_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "moeyard.serving.loading"):
        load_with(tmp_path, repetition_penalty=1.1, num_beams=1)
    assert "asks for repetition_penalty, which is not offered" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "hot"}, "temperature = 'hot', which is not a number"),
        ({"top_p": 2.0}, "top_p is 2.0; use a number above 0"),
        ({"top_k": 1.5}, "top_k = 1.5, which is not a number"),
    ],
    ids=["text", "range", "fraction"],
)
def test_a_file_that_makes_no_sense_gets_one_sentence(tmp_path, values, message):
    with pytest.raises(ModelFileError, match=message):
        load_with(tmp_path, **values)


START = torch.arange(20, 25).unsqueeze(0)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """A folder and the tokens that its model writes when nothing ends it."""
    folder = tmp_path_factory.mktemp("greedy")
    options = {"num_hidden_layers": 2, "initializer_range": 0.4}
    save("olmoe", folder, eos_token_id=None, pad_token_id=None, **options)
    (folder / "generation_config.json").unlink()
    tokens = moeyard.load(folder).generate(START, max_new_tokens=9, temperature=0)[0, 5:].tolist()
    assert len(set(tokens[:6])) == 6
    return folder, tokens


ENDS = {
    "config_alone": (4, None),
    "list_in_config": ([4, 2], None),
    "file_alone": (None, {"eos_token_id": [4, 2]}),
    "file_replaces_config": (1, {"eos_token_id": [5]}),
    "file_without_the_key": (3, {"temperature": 0.7}),
    "file_with_null": (3, {"eos_token_id": None}),
    "empty_file": (3, {}),
    "neither": (None, None),
}
"""End-of-text ids in config.json and generation_config.json, as places in the model's tokens."""


@pytest.mark.parametrize("name", ENDS)
def test_texts_end_where_they_end_in_transformers(greedy, tmp_path, name):
    """In the folder, and in its conversion."""
    source, tokens = greedy
    in_config, in_file = ENDS[name]

    def ids(places):
        if isinstance(places, list):
            return [tokens[place] for place in places]
        return places if places is None else tokens[places]

    shutil.copytree(source, tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids(in_config)}))
    if in_file is not None:
        file = in_file | ({"eos_token_id": ids(in_file.get("eos_token_id"))} if in_file else {})
        if name == "file_without_the_key":
            del file["eos_token_id"]
        (tmp_path / "m/generation_config.json").write_text(json.dumps(file))
    convert(tmp_path / "m", tmp_path / "again")
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        moeyard.load(tmp_path / "m"),
    )
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(START, **options)[0].tolist()
    assert ours.generate(START, max_new_tokens=9, temperature=0)[0].tolist() == expected
    assert len(expected) == 14 or expected[-1] in tokens[:6]
    assert moeyard.load(tmp_path / "again").eos_ids == ours.eos_ids


def test_an_end_that_no_text_can_reach_is_said_and_not_refused(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "moeyard.serving.loading"):
        model = load_with(tmp_path, eos_token_id=[96, 1000, -1])
    assert "eos_token_id has -1, 1000, but ids go up to 96" in caplog.text
    assert 96 in model.eos_ids
