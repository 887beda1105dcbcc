"""What is held out: the share that was asked for, and nothing of it trained on."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.errors import DataError
from moeyard.training.data.corpus import open_shards, prepare_shards, write_both
from moeyard.training.data.documents import Text
from moeyard.training.data.held_out import Split, digest_of, every_nth, find_split
from moeyard.training.data.sources import open_source
from moeyard.training.data.tokenizer import ByteTokenizer
from moeyard.training.formats.text import TextConfig
from moeyard.training.stop import StopRequest
from moeyard.training.work import LongWork

BYTES = ByteTokenizer()


class Texts:
    """A corpus in memory."""

    def __init__(self, texts):
        self.texts = texts

    def __iter__(self):
        return map(Text, self.texts)

    def fingerprint(self):
        return None


def text_of(number, length):
    """Return text that no other number has any line of."""
    line = f"{number} " * 9 + "\n"
    return (line * (length // len(line) + 1))[:length]


def sides_of(texts, fraction):
    source = Texts(texts)
    split = find_split(source, "t", fraction, LongWork("reading", StopRequest()))
    sides = {True: [], False: []}
    for is_held_out, document in split.sides(source):
        sides[is_held_out].append("".join(document))
    return sides[False], sides[True]


def share(training, held_out):
    held = sum(map(len, held_out))
    return held / (held + sum(map(len, training)))


CORPORA = {
    "two_files": [5900, 4100],
    "three_files": [100, 4100, 90_000],
    "nineteen_files": [1000] * 19,
    "twenty-five_files": [1000] * 25,
    "one_long_among_many": [50_000] + [50] * 1000,
    "one_long_in_the_middle": [50] * 500 + [50_000] + [50] * 500,
    "every_twentieth_is_long": ([900] + [50] * 19) * 3,
    "long_ones_in_step": ([900] + [50] * 19) * 30,
    "one_file": [3333],
}


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("name", CORPORA)
def test_the_share_is_what_was_asked_however_long_the_documents(name, fraction):
    texts = [text_of(number, length) for number, length in enumerate(CORPORA[name])]
    training, held_out = sides_of(texts, fraction)
    assert share(training, held_out) == pytest.approx(fraction, rel=0.34)
    assert sum(map(len, training + held_out)) == sum(map(len, texts))
    if name in ("one_file", "two_files"):  # each gives its end
        assert [a + b for a, b in zip(training, held_out, strict=True)] == texts
        assert share(training, held_out) == pytest.approx(fraction, abs=0.001)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 7, 300, 5000])), min_size=1),
    st.sampled_from([0.05, 0.2, 0.45]),
)
def test_held_out_text_is_never_trained_on_and_nothing_is_lost(documents, fraction):
    """Documents may be copies of each other, and empty."""
    texts = [text_of(number, length) for number, length in documents]
    try:
        training, held_out = sides_of(texts, fraction)
    except DataError:
        assert all(text in texts[:: every_nth(fraction)] for text in texts)
        return
    assert (training, held_out) == sides_of(texts, fraction)
    wholes = {text for text in held_out if text in texts and len(text) > 7}
    assert wholes.isdisjoint(training)
    parts = {*training, *held_out} | {a + b for a in set(training) for b in set(held_out)}
    assert all(text in parts for text in texts if text)


def test_copies_of_a_file_that_is_cut_do_not_bring_its_end_back():
    text = text_of(1, 2000) + "the end"
    training, held_out = sides_of([text, text_of(2, 1500), text], 0.1)
    assert sum(t.endswith("the end") for t in held_out) == 2
    assert not any("the end" in t for t in training)


def test_the_log_says_the_share_that_was_held_out(tmp_path, capsys):
    for number, length in enumerate((5900, 4100)):
        (tmp_path / f"{number}.txt").write_text(text_of(number, length))
    prepare_shards(TextConfig(source=str(tmp_path)), BYTES, tmp_path / "data")
    line = "event=split train_tokens=9502 eval_tokens=502 held_out=0.0502 documents=2 cut=ends"
    assert line in capsys.readouterr().err


def test_a_run_that_began_with_whole_files_keeps_what_it_held_out(tmp_path):
    """Earlier releases held out the first of two files, however long."""
    texts = [text_of(number, length) for number, length in enumerate((5900, 4100))]
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.utime(source, (1, 1))
    config, folder = TextConfig(source=str(source)), tmp_path / "data"
    folder.mkdir()
    files = open_source(config, str(source), "train", "data.source")
    old = Split(2, 20, None, {digest_of(Text(texts[0]))})
    fingerprint = f"{files.fingerprint()} without 0.05"
    write_both(folder, files, old, BYTES, fingerprint, StopRequest())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    prepare_shards(config, BYTES, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert len(open_shards(config, BYTES, folder, verify=True)[1]) == 5901
    os.utime(source, (2, 2))  # nothing says any more that it is the same text
    with pytest.raises(DataError, match=r"data\.eval_fraction or release .* use a new run_dir"):
        prepare_shards(config, BYTES, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
