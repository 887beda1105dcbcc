"""The server's tokenizer gives the ids and the text of transformers, and holds up no thread."""

import json
import threading
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from moeyard.moe.folders.text_codec import prompt_ids
from moeyard.moe.folders.tokenizer_folder import open_folder_tokenizer
from moeyard.serving.engine.tokenizer import ServingTokenizer

TEXTS = (
    "",
    " ",
    "two words, naïve café 12\n",
    "<|b|>a<|end|>",
    "<|end|>",
    "x<tool>y",
    "日本",
    "a , b ." * 30,
)
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
SETTINGS = [
    {**PLAIN, "clean_up_tokenization_spaces": False},
    {**PLAIN, "clean_up_tokenization_spaces": True},
    {**PLAIN, "clean_up_tokenization_spaces": False, "split_special_tokens": True},
    {**PLAIN, "tokenizer_class": "Qwen2Tokenizer"},
]


def write(folder, settings) -> None:
    """Write bytes as tokens, with ends around each text, and a limit that no one asked for."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in ("<|b|>", "<|end|>")]
    rust.add_special_tokens(special)
    rust.add_tokens([AddedToken("<tool>", normalized=False)])
    ids = [(name, rust.token_to_id(name)) for name in ("<|b|>", "<|end|>")]
    rust.post_processor = processors.TemplateProcessing(
        single="<|b|> $A <|end|>", special_tokens=ids
    )
    rust.enable_truncation(20)
    rust.enable_padding(length=9)
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "vocab_size": 400}))


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "cleans", "splits", "subclass"])
def test_ids_and_text_are_those_of_transformers(tmp_path, settings):
    write(tmp_path, settings)
    ours, theirs = ServingTokenizer(tmp_path), open_folder_tokenizer(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == prompt_ids(theirs, text), text
        rendered = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_rendered(text) == list(rendered)
        for end in range(len(ids) + 1):
            assert ours.decode(ids[:end]) == theirs.decode(ids[:end], skip_special_tokens=True)
    ours.close()


def test_other_threads_take_turns_while_a_long_prompt_is_read(tmp_path):
    """Counted in turns: a call that holds the interpreter to its end leaves two."""
    write(tmp_path, SETTINGS[0])
    tokenizer = ServingTokenizer(tmp_path)
    started, done = threading.Event(), threading.Event()

    def read() -> None:
        started.set()
        tokenizer.encode("hello world " * 40_000)
        done.set()

    thread = threading.Thread(target=read)
    thread.start()
    started.wait()
    turns = 0
    while not done.is_set():
        time.sleep(0)
        turns += 1
    thread.join()
    tokenizer.close()
    assert turns > 20
