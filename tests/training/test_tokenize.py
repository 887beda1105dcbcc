"""moeyard tokenize: text in, a tokenizer and shards out, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moeyard.cli import main
from moeyard.training.data import documents
from moeyard.training.data.corpus import open_shards, prepare_shards
from moeyard.training.data.documents import Files, cut_into_pieces
from moeyard.training.data.tokenizer import ByteTokenizer, open_tokenizer
from moeyard.training.formats.text import TextConfig

from launch import environment

TEXTS = [f"def function_{n % 90}(argument):\n    return argument * {n}\n" * 3 for n in range(200)]


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenize")
    template = folder / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    command = ["tokenize", str(write_jsonl(folder / "d.jsonl")), str(folder / "out")]
    assert main([*command, "--vocab-size", "300", "--chat-template", str(template)]) == 0
    return folder / "out"


def test_the_tokenizer_is_a_hugging_face_folder(tokenized):
    theirs = AutoTokenizer.from_pretrained(tokenized / "tokenizer")
    assert theirs.eos_token == "<|endoftext|>" and len(theirs) == 300
    for text in (TEXTS[0], "héllo 日本 \x00 \t\r\n x"):
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert len(theirs(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 3
    message = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(message, tokenize=False) == "user: hi\n"


def test_the_shards_are_those_that_training_would_make(tokenized, tmp_path):
    tokenizer = open_tokenizer(str(tokenized / "tokenizer"))
    config = TextConfig(source=str(write_jsonl(tmp_path / "d.jsonl")))
    prepare_shards(config, tokenizer, tmp_path / "shards")
    for name in ("train.bin", "eval.bin"):
        assert (tokenized / name).read_bytes() == (tmp_path / "shards" / name).read_bytes()
    shards = TextConfig(
        source=str(tokenized / "train.bin"), eval_source=str(tokenized / "eval.bin")
    )
    for shard, texts in zip(
        open_shards(shards, tokenizer, tmp_path, verify=True),
        ([t for n, t in enumerate(TEXTS) if n % 20], TEXTS[::20]),
        strict=True,
    ):
        ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        assert shard.slice(0, len(shard)).tolist() == np.concatenate(ids).tolist()


def test_learning_the_same_text_gives_the_same_tokenizer(tokenized, tmp_path):
    source = str(write_jsonl(tmp_path / "d.jsonl"))
    assert main(["tokenize", source, str(tmp_path / "out"), "--vocab-size", "300"]) == 0
    name = "tokenizer/tokenizer.json"
    assert (tokenized / name).read_text() == (tmp_path / "out" / name).read_text()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["ab", "\n", " ", "\n\n", "7", "!?", "é", "\r\n\t"]), max_size=60))
def test_tokenising_the_pieces_is_tokenising_the_whole(tokenized, parts):
    text = "".join(parts)
    tokenizer = open_tokenizer(str(tokenized / "tokenizer"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 12)
        pieces = list(cut_into_pieces([text]))
    assert "".join(pieces) == text and max(map(len, pieces), default=0) <= 12
    if all(len(p) < 12 and p[-2:-1].strip() and p[-1:] == "\n" for p in pieces[:-1]):
        ids = [tokenizer.encode(piece) for piece in pieces]
        assert np.concatenate([[], *ids]).tolist() == tokenizer.encode(text).tolist()


def test_a_text_with_blank_lines_and_indents_is_cut_where_tokens_end(tokenized, monkeypatch):
    text = "def f(x):\n\n\n    y = x\n\t\nreturn\nprint(y)\n \nelse!\n" * 40
    tokenizer = open_tokenizer(str(tokenized / "tokenizer"))
    for size in (45, 64, 100, 333):
        monkeypatch.setattr(documents, "PIECE", size)
        pieces = list(cut_into_pieces([text[:500], text[500:]]))
        assert "".join(pieces) == text and len(pieces) > len(text) / size
        ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
        assert ids.tolist() == tokenizer.encode(text).tolist()


def test_a_folder_and_one_file_of_it_are_sources(tmp_path, capsys):
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "A.TXT").write_text("first " * 50)
    write_jsonl(tmp_path / "in" / "b" / "c.jsonl", ["second " * 50, "third " * 50])
    for name in ("notes.md", "t.csv", "b/x.py", "b/y.py"):
        (tmp_path / "in" / name).write_text("not taken")
    out = str(tmp_path / "out")
    arguments = ["--tokenizer", "bytes", "--eval-fraction", "0.4"]
    assert main(["tokenize", str(tmp_path / "in"), out, *arguments]) == 0
    skipped = "count=4 files='b/x.py, b/y.py, notes.md, ...'"
    assert skipped in capsys.readouterr().err
    read = {n: (tmp_path / "out" / n).read_bytes() for n in ("train.bin", "eval.bin")}
    texts = {n: (np.frombuffer(raw, "<u2") % 256).astype(np.uint8) for n, raw in read.items()}
    wholes = [word * 50 for word in ("first ", "second ", "third ")]
    for name, part in (("train.bin", slice(0, 0.6)), ("eval.bin", slice(0.6, 1))):
        cut = [w[round(part.start * len(w)) : round(part.stop * len(w))] for w in wholes]
        assert texts[name].tobytes().decode() == "".join(text + "\0" for text in cut)


REFUSED = {
    "twice": (["d.jsonl", "done"], "done holds finished token shards already"),
    "in_the_way": (["d.jsonl", "full"], "full is not an empty folder"),
    "no_source": (["none.txt", "out"], "SOURCE is 'none.txt', which cannot be read"),
    "no_text": (["full", "out"], "holds no .txt, .jsonl, .ndjson or .json file among its 1 files"),
    "few_ids": (["d.jsonl", "out", "--vocab-size", "9"], "--vocab-size is 9, but a byte-level"),
    "shard": (["x.bin", "out"], "SOURCE is 'x.bin', which is a token shard already"),
    "template": (["d.jsonl", "out", "--chat-template", "bad"], "is not a Jinja template (line 1"),
    "fraction": (["d.jsonl", "out", "--eval-fraction", "2"], "eval_fraction: it is 2.0, but"),
    "unwritable": (["d.jsonl", "/proc/out"], "/proc/out cannot be written ("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_gets_one_sentence_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, case
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "bad").write_text("{% for %}")
    assert main(["tokenize", "d.jsonl", "done", "--tokenizer", "bytes"]) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    capsys.readouterr()
    arguments, message = REFUSED[case]
    assert main(["tokenize", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("error: ") == shown.count("\n") == 1, shown
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_that_looks_whole(tmp_path, number):
    source = write_jsonl(tmp_path / "d.jsonl", TEXTS * 400)
    command = [sys.executable, "-m", "moeyard.cli", "tokenize", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--tokenizer", "bytes"],
        env=environment(),
        cwd="/",
        stderr=subprocess.PIPE,
        text=True,
    )
    hidden = tmp_path / ".out.tmp"
    while not (hidden / "train.bin").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 130 and not hidden.exists()
        assert shown.splitlines()[-1] == "stopped by SIGTERM while tokenising."
    write_jsonl(source)
    assert main(["tokenize", str(source), str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out"]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_that_is_stopped_while_it_reads_text_says_so_in_one_line(
    tmp_path, config_file, ranks
):
    source = write_jsonl(tmp_path / "d.jsonl", TEXTS * 1000)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "moeyard.training", str(config_file), f"run_dir={tmp_path}/run"]
    process = subprocess.Popen(
        [*command, f"data.source={source}"],
        env=environment(),
        cwd="/",
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run" / "data" / "train.bin").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)
    assert "stopped by SIGTERM while tokenising.\n" in shown
    assert not (tmp_path / "run" / "data" / "train.json").exists()
    if ranks == 1:  # torchrun adds its own traceback about the signal
        assert process.returncode == 0 and "Traceback" not in shown
    else:
        assert "exitcode" not in shown and "[rank" not in shown, shown


def test_a_restart_reads_unchanged_files_only_once(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "d.jsonl")
    os.utime(source, (1, 1))
    config = TextConfig(source=str(source))
    prepare_shards(config, ByteTokenizer(), tmp_path / "shards")

    def refuse(self):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(Files, "__iter__", refuse)
        prepare_shards(config, ByteTokenizer(), tmp_path / "shards")
        os.utime(source, (2, 2))
        with pytest.raises(AssertionError, match="read again"):
            prepare_shards(config, ByteTokenizer(), tmp_path / "shards")
    prepare_shards(config, ByteTokenizer(), tmp_path / "shards")  # read, and found the same
