"""A tokenizer.json that says all is read without transformers, with the same ids and text."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moeyard.moe.folders.plain_tokenizer import open_plain
from moeyard.moe.folders.text_codec import TextCodec, prompt_ids
from moeyard.moe.folders.tokenizer_folder import open_folder_tokenizer
from moeyard.training.data.tokenizer import ByteTokenizer

TEXTS = (
    "",
    " ",
    "two words, naïve café 12\n",
    "a<|end|>",
    "<|end|>",
    "<|end|> b",
    "x<tool>y",
    "日本",
)
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|end|>",
    "clean_up_tokenization_spaces": False,
}


def write(folder, settings=SETTINGS, config=None, ends_texts=False):
    """Write a byte-level BPE with a special token and an ordinary added one."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(["two words and two words"] * 9, trainer)
    rust.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    rust.add_tokens([AddedToken("<tool>", normalized=False)])
    if ends_texts:
        end = rust.token_to_id("<|end|>")
        rust.post_processor = processors.TemplateProcessing(
            single="$A <|end|>", special_tokens=[("<|end|>", end)]
        )
    folder.mkdir(exist_ok=True)
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    values = {"model_type": "qwen3_moe", "vocab_size": 400} | (config or {})
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("kind", ["bytes", "bpe", "bpe that ends texts"])
def test_ids_and_text_are_those_of_transformers(tmp_path, kind):
    write(tmp_path, ends_texts=kind == "bpe that ends texts")
    if kind == "bytes":
        ByteTokenizer().save(tmp_path)
    assert open_plain(tmp_path) is not None
    codec, theirs = TextCodec(tmp_path), open_folder_tokenizer(tmp_path)
    for text in TEXTS:
        ids = codec.encode(text)
        assert ids == prompt_ids(theirs, text), text
        for end in range(len(ids) + 1):
            assert codec.decode(ids[:end]) == theirs.decode(ids[:end], skip_special_tokens=True)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": None},
        {"clean_up_tokenization_spaces": True},
        {"add_bos_token": True},
        {"eos_token": "<|other|>"},
        {"eos_token": {"content": "<|end|>", "__type": "AddedToken"}},
        {"added_tokens_decoder": {"300": {"content": "<a>"}}},
        {"a_setting_of_tomorrow": 1},
    ],
)
def test_settings_that_may_change_ids_are_left_to_transformers(tmp_path, change):
    write(tmp_path, {**SETTINGS, **change})
    assert open_plain(tmp_path) is None


def test_files_that_may_change_ids_are_left_to_transformers(tmp_path):
    write(tmp_path, config={"transformers_version": "4.50.0"})
    assert open_plain(tmp_path) is None
    write(tmp_path)
    assert open_plain(tmp_path) is not None
    (tmp_path / "added_tokens.json").write_text("{}")
    assert open_plain(tmp_path) is None
