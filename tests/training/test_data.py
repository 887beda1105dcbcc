"""Corpora, tokenizers, shards and the global batch."""

import hashlib
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from moeyard.errors import DataError
from moeyard.training.data.batches import GlobalBatches
from moeyard.training.data.corpus import open_shards, prepare_shards
from moeyard.training.data.documents import Text, standard_library
from moeyard.training.data.held_out import find_split
from moeyard.training.data.shards import ShardWriter, open_shard
from moeyard.training.data.sources import open_source
from moeyard.training.data.tokenizer import ByteTokenizer, FolderTokenizer, open_tokenizer
from moeyard.training.formats.text import TextConfig
from moeyard.training.stop import StopRequest
from moeyard.training.work import LongWork

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A small BPE with merges, as users have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def function(argument): return argument"] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make(path, texts, tokenizer=BYTES):
    writer = ShardWriter(path, tokenizer)
    for text in texts:
        writer.add(Text(text))
    writer.finish(fingerprint=None)
    return path


def read_documents(source, text_key="text", field="data.source"):
    config = TextConfig(source=source, text_key=text_key)
    return ["".join(document) for document in open_source(config, source, "train", field)]


def test_saved_byte_tokenizer_reads_as_transformers_one(tmp_path):
    BYTES.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn 'héllo 日本 \x00 Ġ'  # \u00ad"
    assert theirs(text)["input_ids"] == BYTES.encode(text).tolist() == list(text.encode())
    assert theirs.decode(BYTES.encode(text).tolist()) == text
    assert (theirs.eos_token_id, len(theirs)) == (BYTES.eos_id, BYTES.vocab_size)


def test_a_folder_tokenizer_is_used_as_it_is(tokenizer_folder, tmp_path):
    ours, theirs = (
        FolderTokenizer(tokenizer_folder),
        AutoTokenizer.from_pretrained(tokenizer_folder),
    )
    assert ours.encode("def function(x)").tolist() == theirs("def function(x)")["input_ids"]
    assert ours.vocab_size == len(theirs) > 257 and ours.eos_id == 0 and ours.sha256 != BYTES.sha256
    ours.save(tmp_path / "copy")
    assert FolderTokenizer(tmp_path / "copy").sha256 == ours.sha256


def test_a_shard_gives_back_its_documents_with_ends(tmp_path):
    shard = open_shard(make(tmp_path / "a.bin", ["ab", "", "cé"]), BYTES, verify=True)
    assert shard.slice(0, 9).tolist() == [97, 98, 256, 256, 99, 0xC3, 0xA9, 256]
    assert (len(shard), shard.facts.num_bytes, shard.facts.dtype) == (8, 5, "uint16")
    counts = shard.token_counts()
    assert counts[256] == 3 and counts[97] == 1 and sum(counts) == 8


def test_a_shard_for_another_tokenizer_is_refused(tmp_path, tokenizer_folder):
    path = make(tmp_path / "a.bin", ["some text"])
    with pytest.raises(DataError, match="was made with tokenizer"):
        open_shard(path, FolderTokenizer(tokenizer_folder), verify=False)


def test_the_same_vocabulary_with_other_merges_is_another_tokenizer(tmp_path, tokenizer_folder):
    import shutil

    shutil.copytree(tokenizer_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"].reverse()
    path.write_text(json.dumps(values))
    ours, other = FolderTokenizer(tokenizer_folder), FolderTokenizer(tmp_path / "other")
    assert ours.sha256 != other.sha256


def test_a_shard_with_ids_beyond_the_vocabulary_is_refused(tmp_path):
    path = make(tmp_path / "a.bin", ["some text"])
    data = np.fromfile(path, dtype="<u2")
    data[2] = 300
    data.tofile(path)
    facts = json.loads(path.with_suffix(".json").read_text())
    facts["file_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="holds token id 300, but the tokenizer's ids are below"):
        open_shard(path, BYTES, verify=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut": (cut, "bytes, its sidecar says"),
    "flipped": (flip, "does not match its sidecar's hash"),
    "gone": (lambda p: p.unlink(), "has 0 bytes"),
    "no_sidecar": (lambda p: p.with_suffix(".json").unlink(), "no usable sidecar"),
    "sidecar_cut": (lambda p: cut(p.with_suffix(".json")) or cut(p.with_suffix(".json")), "usable"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused(tmp_path, damage):
    path = make(tmp_path / "a.bin", ["some text"])
    apply, message = DAMAGES[damage]
    apply(path)
    with pytest.raises(DataError, match=message):
        open_shard(path, BYTES, verify=True)


def test_every_source_becomes_two_disjoint_shards(tmp_path):
    documents = [f"document {n} " * 20 for n in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"t": d}) + "\n" for d in documents))
    (tmp_path / "d.txt").write_text("".join(documents))
    for config, parts in (
        (TextConfig(source=str(tmp_path / "d.jsonl"), text_key="t", eval_fraction=0.1), 4),
        (TextConfig(source=str(tmp_path / "d.txt"), eval_fraction=0.1), 1),
    ):
        folder = tmp_path / f"shards{parts}"
        prepare_shards(config, BYTES, folder)
        train, held_out = open_shards(config, BYTES, folder, verify=True)
        texts = [bytes(s.slice(0, len(s))[:-1] % 256).decode("latin1") for s in (train, held_out)]
        assert abs(len(texts[1]) / sum(map(len, texts)) - 0.1) < 0.02
        assert held_out.token_counts()[256] == parts
        before = (folder / "train.bin").stat().st_mtime_ns
        prepare_shards(config, BYTES, folder)  # again: kept as it is
        assert (folder / "train.bin").stat().st_mtime_ns == before


def test_changed_text_under_an_old_run_is_refused(tmp_path):
    text = tmp_path / "d.txt"
    text.write_text("a" * 500)
    config = TextConfig(source=str(text))
    prepare_shards(config, BYTES, tmp_path / "shards")
    text.write_text("b" * 500)
    with pytest.raises(DataError, match="made from other text"):
        prepare_shards(config, BYTES, tmp_path / "shards")


def test_a_corpus_of_one_text_many_times_leaves_nothing_to_train_on(tmp_path):
    text = tmp_path / "d.jsonl"
    text.write_text('{"text": "the same"}\n' * 40)
    with pytest.raises(DataError, match="holds 40 documents, all of them copies of held-out ones"):
        prepare_shards(TextConfig(source=str(text)), BYTES, tmp_path / "shards")


def test_the_standard_library_is_a_corpus_without_its_tests():
    paths = [path for path, _ in standard_library()]
    assert paths == sorted(paths) and "argparse.py" in paths and len(paths) > 300
    assert not any(
        part in ("test", "tests", "site-packages") for p in paths for part in p.split("/")
    )
    documents = read_documents("stdlib")
    source = open_source(TextConfig(), "stdlib", "train", "data.source")
    split = find_split(source, "stdlib", 0.05, LongWork("reading", StopRequest()))
    sides = [(is_held_out, "".join(document)) for is_held_out, document in split.sides(source)]
    training = [text for is_held_out, text in sides if not is_held_out]
    held_out = [text for is_held_out, text in sides if is_held_out]
    assert held_out == documents[::20]
    assert 0.03 < len(held_out) / len(documents) < 0.07
    assert set(training).isdisjoint(held_out)
    assert set(training) | set(held_out) == set(documents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2 is not a JSON object with text under 'text'"),
        ('{"text": "a"}\nnonsense\n', "line 2"),
        ('{"text": null}\n', "line 1 is not a JSON object with text"),
        ('{"text": 7}\n', "line 1"),
        ('{"text": "\\ud83d"}\n', "line 1"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_documents(str(path), "text", "data.source")


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_documents(str(tmp_path / "none.txt"), "text", "data.source")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_documents(str(tmp_path / "latin.txt"), "text", "data.source")
    with pytest.raises(DataError, match="is not a folder"):
        open_tokenizer(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="which has no tokenizer"):
        open_tokenizer(str(tmp_path / "empty"))
    shard = make(tmp_path / "a.bin", ["text"])
    with pytest.raises(DataError, match=r"give data\.eval_source"):
        prepare_shards(TextConfig(source=str(shard)), BYTES, tmp_path / "shards")


def test_the_global_batch_does_not_depend_on_how_ranks_share_it(tmp_path):
    shard = open_shard(
        make(tmp_path / "a.bin", ["".join(map(chr, range(32, 127))) * 50]), BYTES, True
    )
    batches = GlobalBatches(shard, sequence_length=16, batch_sequences=12, seed=5)
    for step in (0, 7, 100):  # the last is some epochs on
        whole = batches.sequences(step, range(12))
        parts = [batches.sequences(step, range(i, i + 3)) for i in range(0, 12, 3)]
        assert torch.equal(torch.cat(parts), whole) and whole.shape == (12, 17)
        again = GlobalBatches(shard, 16, 12, seed=5).sequences(step, range(12))
        assert torch.equal(again, whole)
    other = GlobalBatches(shard, 16, 12, seed=6).sequences(0, range(12))
    assert not torch.equal(other, batches.sequences(0, range(12)))


def test_an_epoch_shows_every_window_once(tmp_path):
    tokens = "".join(chr(33 + n % 90) + chr(33 + n // 90) for n in range(1000))
    shard = open_shard(make(tmp_path / "a.bin", [tokens]), BYTES, verify=True)
    batches = GlobalBatches(shard, sequence_length=20, batch_sequences=10, seed=0)
    assert len(batches) == 100
    rows = torch.cat([batches.sequences(step, range(10)) for step in range(10)])
    assert len({tuple(row.tolist()) for row in rows}) == 100
    second = torch.cat([batches.sequences(step, range(10)) for step in range(10, 20)])
    assert not torch.equal(rows, second)
    assert {tuple(r.tolist()) for r in rows} == {tuple(r.tolist()) for r in second}


def test_too_little_text_is_refused(tmp_path):
    shard = open_shard(make(tmp_path / "a.bin", ["short"]), BYTES, verify=True)
    with pytest.raises(DataError, match="too few for one sequence"):
        GlobalBatches(shard, sequence_length=64, batch_sequences=1, seed=0)
    assert np.dtype(shard.facts.dtype).itemsize == 2
