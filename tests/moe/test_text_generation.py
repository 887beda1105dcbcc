"""A loaded model reads and writes text: at once, in lists, and piece by piece."""

import shutil

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError, ModelFileError

from small_model import write_decoder

PROMPT = "def function_7("
DRAWN = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 5}


@pytest.fixture(scope="module")
def model(model_folder):
    return moeyard.load(model_folder)


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([list(text.encode())])


def test_text_is_continued_as_its_ids_are_and_comes_without_the_prompt(model):
    found = model.generate(PROMPT, max_new_tokens=20, temperature=0, ignore_eos=True)
    ids = model.generate(ids_of(PROMPT), max_new_tokens=20, temperature=0, ignore_eos=True)
    new = ids[0, len(PROMPT) :].tolist()
    assert len(new) == 20
    assert found == model.tokenizer.decode(new, skip_special_tokens=True)


def test_every_text_of_a_list_is_continued_as_if_it_were_alone(model):
    prompts = [PROMPT, "x", "a longer prompt than the others, for its own length"]
    together = model.generate(prompts, max_new_tokens=12, temperature=0)
    assert together == [model.generate(p, max_new_tokens=12, temperature=0) for p in prompts]
    assert model.generate([], max_new_tokens=12) == []


@pytest.mark.parametrize("options", [{"temperature": 0}, DRAWN], ids=["greedy", "drawn"])
def test_the_pieces_of_a_stream_join_to_what_generate_returns(model, options):
    whole = model.generate(PROMPT, max_new_tokens=40, ignore_eos=True, **options)
    for prompt in (PROMPT, list(PROMPT.encode()), ids_of(PROMPT)[0]):
        stream = model.stream(prompt, max_new_tokens=40, ignore_eos=True, **options)
        pieces = list(stream)
        assert "".join(pieces) == whole
        assert all(pieces)
        assert (stream.finish_reason, stream.num_tokens) == ("length", 40)
    assert list(model.stream(PROMPT, max_new_tokens=0)) == []


def test_a_stop_text_ends_the_answer_before_it(model):
    options = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    whole = model.generate(PROMPT, **options)
    stop = whole[9:11]
    expected = whole[: whole.index(stop)]
    assert model.generate(PROMPT, stop=stop, **options) == expected
    both = model.generate([PROMPT, PROMPT], stop=["\u2603", stop], **options)
    assert both == [expected, expected]
    stream = model.stream(PROMPT, stop=[stop], **options)
    assert "".join(stream) == expected
    assert stream.finish_reason == "stop"


def test_an_end_of_text_id_ends_the_answer_unless_it_is_to_be_ignored(tmp_path, model):
    options = {"max_new_tokens": 12, "temperature": 0}
    ids = model.generate(ids_of(PROMPT), ignore_eos=True, **options)[0, len(PROMPT) :].tolist()
    write_decoder(tmp_path / "early", model.decoder, eos_id=ids[3])
    early = moeyard.load(tmp_path / "early")
    stream = early.stream(PROMPT, **options)
    first = ids.index(ids[3])
    assert "".join(stream) == model.tokenizer.decode(ids[:first])
    assert (stream.finish_reason, stream.num_tokens) == ("stop", first + 1)
    assert len(early.generate(ids_of(PROMPT), ignore_eos=True, **options)[0]) == len(PROMPT) + 12


def test_a_stream_that_is_left_early_computes_no_more(model):
    seen = []
    handle = model.decoder.register_forward_hook(lambda *_: seen.append(1))
    stream = model.stream(PROMPT, max_new_tokens=30, temperature=0, ignore_eos=True)
    next(stream)
    handle.remove()
    assert len(seen) == stream.num_tokens < 30
    assert not torch.is_inference_mode_enabled(), "between two pieces the caller may train"


def test_a_folder_without_a_tokenizer_takes_ids_and_says_why_it_takes_no_text(
    tmp_path, model_folder
):
    folder = tmp_path / "bare"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    bare = moeyard.load(folder)
    bare.generate(ids_of(PROMPT), max_new_tokens=2)
    for use in (lambda: bare.generate("x"), lambda: bare.stream("x"), lambda: bare.tokenizer):
        with pytest.raises(ModelFileError, match=r"has no tokenizer; add tokenizer.json"):
            use()


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"prompt": 5}, "prompt is 5; give text, a list of texts, or a tensor"),
        ({"prompt": [1, 2]}, r"prompt is \[1, 2\]; give text"),
        ({"prompt": ""}, "prompt is empty; give at least one token"),
        ({"prompt": torch.ones(1, 3)}, "ids have type torch.float32"),
        ({"prompt": torch.tensor([1, 2])}, r"ids have shape \[2\]; give \[B, T\]"),
        ({"prompt": torch.tensor([[1]]), "stop": "x"}, "stop is given, but the prompt is ids"),
        ({"prompt": "x", "stop": [""]}, "give texts that are not empty"),
        ({"prompt": "x", "temperature": "hot"}, "temperature is 'hot'; use a number"),
        ({"prompt": "x", "max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"prompt": "x", "seed": -1}, "seed -1"),
        ({"prompt": "x", "attention_mask": torch.ones(1, 1)}, "but the prompt is text"),
        ({"prompt": "x" * 250}, "the sequence would have 282 tokens"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(model, given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        model.generate(**given)


def test_calls_and_streams_of_a_wrong_type_get_a_sentence(model):
    with pytest.raises(ConfigError, match="ids are 'hello'; give a tensor"):
        model("hello")
    with pytest.raises(ConfigError, match=r"prompt is \['a'\]; give text, or the ids of one row"):
        model.stream(["a"])


def test_special_tokens_are_no_part_of_a_text(model):
    assert model._codec.decode([104, 256, 105]) == "hi"
