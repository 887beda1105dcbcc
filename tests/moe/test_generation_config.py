"""How a folder wants its tokens chosen, and what a caller says instead."""

import json
import logging

import pytest
import torch

import moeyard
from moeyard.errors import ModelFileError
from moeyard.serving.completion_request import CompletionRequest
from moeyard.serving.completions import sampling_of

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
        ({"temperature": "hot"}, "temperature = 'hot', which is no number"),
        ({"top_p": 2.0}, "top_p is 2.0; use a number above 0"),
        ({"top_k": 1.5}, "top_k = 1.5, which is no number"),
    ],
    ids=["text", "range", "fraction"],
)
def test_a_file_that_makes_no_sense_gets_one_sentence(tmp_path, values, message):
    with pytest.raises(ModelFileError, match=message):
        load_with(tmp_path, **values)
