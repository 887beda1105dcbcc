"""Tokenizers of all kinds of files: found, opened, copied, and never made up."""

import base64
import importlib.util
import json

import pytest

from moeyard.errors import DataError, ModelFileError
from moeyard.moe.folders.tokenizer_folder import (
    SETTINGS_FILES,
    VOCABULARY_FILES,
    copy_tokenizer,
    has_tokenizer,
    open_folder_tokenizer,
)
from moeyard.training.data.tokenizer import FolderTokenizer

TEXT = "two words, naïve café 12\n"


def write_config(folder, tokenizer_class, **more):
    config = {"model_type": "qwen3_moe", "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"tokenizer_class": tokenizer_class, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_vocabulary_and_merges(folder):
    """Write a byte-level BPE like GPT-2's, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(["two words and two words"] * 9, trainer)
    rust.model.save(str(folder))
    return rust


def write_tiktoken(folder, name):
    ranks = [bytes([byte]) for byte in range(256)] + [b" w", b"or", b" wor", b"ds"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (folder / name).write_text("".join(lines))


@pytest.mark.parametrize("name", VOCABULARY_FILES)
def test_every_file_that_holds_a_vocabulary_is_found_and_copied_with_its_settings(tmp_path, name):
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "additional_chat_templates").mkdir(parents=True)
    files = [name, *SETTINGS_FILES, "additional_chat_templates/rag.jinja"]
    assert not has_tokenizer(source)
    for number, file in enumerate(files):
        (source / file).write_bytes(bytes([number]) * 7)
    copy_tokenizer(source, target)
    assert has_tokenizer(source) and has_tokenizer(target)
    assert all((target / file).read_bytes() == (source / file).read_bytes() for file in files)


def test_a_vocabulary_with_merges_is_the_same_tokenizer_for_training_and_after_export(tmp_path):
    rust = write_vocabulary_and_merges(tmp_path)
    write_config(tmp_path, "Qwen2Tokenizer", eos_token="<|endoftext|>")
    ours = FolderTokenizer(tmp_path)
    assert ours.encode("two words").tolist() == rust.encode("two words").ids
    assert open_folder_tokenizer(tmp_path).decode(ours.encode(TEXT).tolist()) == TEXT
    ours.save(tmp_path / "known")
    assert (tmp_path / "known/merges.txt").read_text() == (tmp_path / "merges.txt").read_text()
    assert FolderTokenizer(tmp_path / "known").sha256 == ours.sha256

    (tmp_path / "tokenizer_config.json").unlink()  # config.json alone says what the files are
    FolderTokenizer(tmp_path).save(tmp_path / "unknown")
    again = FolderTokenizer(tmp_path / "unknown")
    assert again.encode(TEXT).tolist() == ours.encode(TEXT).tolist()


def test_a_tokenizer_that_transformers_would_make_up_is_refused(tmp_path):
    write_config(tmp_path, "Qwen2Tokenizer")
    with pytest.raises(ModelFileError, match=r"has no tokenizer; add tokenizer\.json"):
        open_folder_tokenizer(tmp_path)
    write_vocabulary_and_merges(tmp_path)
    write_config(tmp_path, "LlamaTokenizer", eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    with pytest.raises(ModelFileError, match=r"does not understand .* as ''"):
        open_folder_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"data\.tokenizer cannot be opened: .* as ''"):
        FolderTokenizer(tmp_path)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path):
    write_tiktoken(tmp_path, "tiktoken.model")
    write_config(tmp_path, "TikTokenTokenizer", auto_map={"AutoTokenizer": ["own.Own", None]})
    with pytest.raises(ModelFileError, match="its own Python code, which is not run; save"):
        open_folder_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "package"), [(b"\x0a\x00", "sentencepiece"), (b"aGk= 0\n", "tiktoken")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, content, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelFileError, match=f"without the Python package {package}; pip install"):
        open_folder_tokenizer(tmp_path)


def test_a_sentencepiece_model_is_read(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "t.txt").write_text("two words and three more words, naïve café\n" * 200)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    write_config(tmp_path, "LlamaTokenizer", eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    ours = FolderTokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.encode(TEXT.strip()).tolist() == theirs.encode(TEXT.strip())
    assert ours.vocab_size == len(theirs) and ours.eos_id == theirs.eos_id()


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_a_tiktoken_vocabulary_is_read(tmp_path, name):
    pytest.importorskip("tiktoken")
    write_tiktoken(tmp_path, name)
    write_config(tmp_path, "PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    ids = FolderTokenizer(tmp_path).encode("two words").tolist()
    assert ids == [*b"two", 258, 259]
