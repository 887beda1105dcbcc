"""A data set that is streamed while training runs: exact, resumable, bounded."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from moeyard.errors import ConfigError, DataError, Stopped
from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main
from moeyard.training.data import hub
from moeyard.training.data.block_writer import BlockWriter
from moeyard.training.data.blocks import Blocks
from moeyard.training.data.hub import HubReader, HubSource, Position
from moeyard.training.data.stream import StreamBatches
from moeyard.training.data.stream_setup import prepare_stream
from moeyard.training.data.text import build_data
from moeyard.training.data.tokenizer import ByteTokenizer
from moeyard.training.read_config import read_run_config
from moeyard.training.stop import StopRequest

from kills import Launch, digest, kill_at_random, wait_until
from launch import environment, torchrun

LENGTH, BATCH, BLOCK_WINDOWS = 32, 8, 20
EOS = ByteTokenizer.eos_id
TEXTS = [f"document {n}: " + "na " * (n * 37 % 90) for n in range(120)]
TEXTS[45] = TEXTS[20]  # a copy of a held-out document


def write_split(folder, split, texts, num_files):
    share = -(-len(texts) // num_files)
    for number in range(num_files):
        part = texts[number * share : (number + 1) * share]
        table = pa.table({"content": part, "n": list(range(len(part)))})
        name = f"{split}-{number:05d}-of-{num_files:05d}.parquet"
        pq.write_table(table, folder / name, row_group_size=7)


@pytest.fixture
def data_set(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_split(folder, "train", TEXTS, 3)
    write_split(folder, "validation", ["to be evaluated " * 30] * 4, 1)
    return folder


@pytest.fixture
def stream_config(tmp_path, config_file, data_set):
    """A configuration file of a run that streams."""
    values = yaml.safe_load(config_file.read_text())
    values["data"] = {
        "source": f"hf:{data_set}",
        "text_key": "content",
        "tokenizer": "bytes",
        "block_tokens": BLOCK_WINDOWS * LENGTH,
        "stream_ahead_tokens": 2 * BLOCK_WINDOWS * LENGTH,
    }
    path = tmp_path / "stream.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def opened(stream_config, folder, *overrides, mesh=None, stop=None):
    config = read_run_config(stream_config, [f"run_dir={folder}", *overrides])
    mesh, stop = mesh or Mesh(), stop or StopRequest()
    if mesh.rank == 0:
        prepare_stream(config, ByteTokenizer(), folder, stop)
    return StreamBatches(config, ByteTokenizer(), folder, mesh, stop)


def batches_of(stream, steps):
    try:
        return [stream.sequences(step, range(BATCH)) for step in steps]
    finally:
        stream.close()


def expected_batches(steps, num_evaluated, seed=3):
    """Concatenate everything and cut it, as the promise says."""
    held_out = TEXTS[::20]
    kept = [t for n, t in enumerate(TEXTS) if n % 20 and t not in held_out[:num_evaluated]]
    epoch = [token for text in kept for token in [*text.encode(), EOS]]
    tokens = np.array(epoch * 10)
    found = []
    for step in steps:
        rows = []
        for position in range(step * BATCH, (step + 1) * BATCH):
            block, place = divmod(position, BLOCK_WINDOWS)
            order = np.random.Generator(np.random.PCG64([seed, block])).permutation(BLOCK_WINDOWS)
            start = (block * BLOCK_WINDOWS + order[place]) * LENGTH
            rows.append(tokens[start : start + LENGTH + 1])
        found.append(torch.from_numpy(np.stack(rows)))
    return found


def assert_same(found, expected):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"batch {step} differs"


def test_batches_are_the_windows_of_the_data_set_in_order_over_epochs(tmp_path, stream_config):
    steps = range(120)
    assert len(steps) * BATCH * LENGTH > 1.5 * sum(len(text) + 1 for text in TEXTS)
    found = batches_of(opened(stream_config, tmp_path / "data"), steps)
    evaluated = json.loads((tmp_path / "data" / "stream.json").read_text())["held_out"]
    assert len(evaluated) >= 2  # so document 45, a copy of 20, is left out
    assert_same(found, expected_batches(steps, len(evaluated)))


def test_a_stream_goes_on_from_any_step_without_what_was_let_go(tmp_path, stream_config):
    steps = range(30)
    whole = batches_of(opened(stream_config, tmp_path / "whole"), steps)
    first = opened(stream_config, tmp_path / "parts")
    batches_of(first, range(17))
    first.forget_before(14)
    blocks = tmp_path / "parts" / "blocks"
    assert min(int(p.stem[6:]) for p in blocks.glob("*.bin")) == 14 * BATCH // BLOCK_WINDOWS
    again = batches_of(opened(stream_config, tmp_path / "parts"), range(14, 30))
    assert_same(again, whole[14:])
    for path in blocks.iterdir():
        path.unlink()
    assert_same(batches_of(opened(stream_config, tmp_path / "parts"), range(20, 30)), whole[20:])


def test_a_damaged_block_is_made_again(tmp_path, stream_config):
    whole = batches_of(opened(stream_config, tmp_path / "data"), range(20))
    path = tmp_path / "data" / "blocks" / "block-00000003.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    (tmp_path / "data" / "blocks" / "block-00000005.json").write_text("{")
    assert_same(batches_of(opened(stream_config, tmp_path / "data"), range(6, 20)), whole[6:])


def test_reading_stays_a_bounded_way_ahead(tmp_path, stream_config):
    stream = opened(stream_config, tmp_path / "data")
    blocks = tmp_path / "data" / "blocks"
    stream.wait_for(0)
    wait_until(lambda: len(list(blocks.glob("*.json"))) == 3, "the blocks ahead", 20)
    time.sleep(0.3)
    assert len(list(blocks.glob("*.json"))) == 3
    stream.wait_for(7)
    wait_until(lambda: len(list(blocks.glob("*.json"))) == 6, "the blocks ahead", 20)
    stream.close()


def test_held_out_documents_are_evaluated_and_never_trained_on(tmp_path, stream_config):
    config = read_run_config(stream_config, [f"run_dir={tmp_path}"])
    data = build_data(config, tmp_path / "data", Mesh())
    rows = data.held_out.in_order(range(2))
    assert bytes((rows[0] % 256).tolist()).startswith(b"document 0: ")
    seen = torch.cat([data.train.sequences(step, range(BATCH)) for step in range(60)])
    data.train.close()
    text = bytes((seen[:, :-1].reshape(-1) % 256).tolist())
    for number in range(0, 120, 20):
        assert f"document {number}: ".encode() not in text
    assert b"document 21: " in text and data.num_train_tokens is None
    split = read_run_config(stream_config, [f"run_dir={tmp_path}", "data.eval_split=validation"])
    other = build_data(split, tmp_path / "other", Mesh())
    assert bytes(other.held_out.in_order(range(1))[0].tolist()).startswith(b"to be evaluated")
    seen = torch.cat([other.train.sequences(step, range(BATCH)) for step in range(5)])
    other.train.close()
    assert (seen[:, :12] == torch.tensor(list(b"document 0: "))).all(dim=1).any()


REFUSED = {
    "nowhere": ("data.source=hf:./nowhere", "is 'hf:./nowhere', which cannot be opened ("),
    "split": ("data.split=dev", "split 'dev' is not in 'hf:SET', which has train, validation"),
    "eval_split": ("data.eval_split=dev", "split 'dev' is not in 'hf:SET', which has train, val"),
    "column": ("data.text_key=text", "data.text_key is 'text', but 'hf:SET' has the columns con"),
    "no_text": ("data.text_key=n", "row 1 of 'hf:SET' has no text under 'n' but a int"),
    "config": ("data.hf_config=x", "BuilderConfig 'x' not found"),
    "trained_on": ("data.eval_split=train", "eval_split is 'train', which is trained on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_streamed_gets_one_sentence(tmp_path, stream_config, data_set, capsys, case):
    override, message = REFUSED[case]
    assert main([str(stream_config), f"run_dir={tmp_path}/run", override]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert message.replace("SET", str(data_set)) in shown[-1]
    assert sum("error: " in line for line in shown) == 1 and "Traceback" not in "".join(shown)


def test_streaming_without_the_library_names_the_extra(stream_config, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'moeyard\[datasets\]'"):
        opened(stream_config, tmp_path / "data")


def test_splits_of_what_has_none_and_changed_streams_are_refused(tmp_path, stream_config):
    with pytest.raises(ConfigError, match="'stdlib' has no splits"):
        read_run_config(stream_config, ["data.source=stdlib", "data.eval_split=test"])
    batches_of(opened(stream_config, tmp_path / "data"), range(1))
    for override, field in (
        ("data.block_tokens=64", "block_windows = 20, but the configuration now gives 2"),
        ("train.sequence_length=16", "sequence_length = 32"),
        ("data.text_key=n", "text_key = content"),
        ("data.eval_fraction=0.1", "every = 20"),
    ):
        with pytest.raises(DataError, match=field):
            opened(stream_config, tmp_path / "data", override)


def test_a_split_without_text_is_refused_and_not_read_for_ever(tmp_path, stream_config, data_set):
    write_split(data_set, "train", ["only one", None], 1)
    for path in data_set.glob("train-*-of-00003.parquet"):
        path.unlink()
    stream = opened(stream_config, tmp_path / "data")
    with pytest.raises(DataError, match="holds no text to train on"):
        batches_of(stream, range(1))


def truncate(data_set):
    path = data_set / "train-00001-of-00003.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path, whole


def test_a_failure_that_passes_is_read_over(stream_config, data_set):
    data = read_run_config(stream_config, ["run_dir=x"]).data
    path, whole = truncate(data_set)
    pauses = []

    def mend(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            path.write_bytes(whole)

    reader = HubReader(HubSource(data, data.source, "train", "data.source"), Position(), mend)
    assert list(iter(reader.next_text, None)) == TEXTS
    assert pauses == [1, 2]


def test_a_stream_that_breaks_off_says_where_and_goes_on_there(
    tmp_path, stream_config, data_set, monkeypatch, capsys
):
    monkeypatch.setattr(hub, "PAUSES_S", (0.01, 0.01))
    steps = ["train.steps=27", "checkpoint.every=99", "train.eval_sequences=2"]
    assert main([str(stream_config), f"run_dir={tmp_path}/whole", *steps]) == 0
    path, whole = truncate(data_set)
    capsys.readouterr()
    assert main([str(stream_config), f"run_dir={tmp_path}/run", *steps]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert "broke off after 40 documents" in shown[-1] and "2 more attempts failed" in shown[-1]
    assert not [line for line in shown if "Traceback" in line]
    saved = int((tmp_path / "run" / "latest").read_text().strip()[5:])
    assert saved == len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > 3
    assert saved < 27  # every step that had data is saved, though no checkpoint was due
    path.write_bytes(whole)
    assert main([str(stream_config), f"run_dir={tmp_path}/run", *steps]) == 0
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_waiting_for_data_ends_when_asked(tmp_path, stream_config, data_set, monkeypatch):
    stop = StopRequest()
    stream = opened(stream_config, tmp_path / "data", stop=stop)
    truncate(data_set)
    stop.signal_name = "SIGTERM"
    with pytest.raises(Stopped, match="stopped by SIGTERM while waiting for data"):
        batches_of(stream, range(40))


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines]


@pytest.mark.dist
def test_a_hash_router_and_two_ranks_read_the_same_stream(tmp_path, stream_config):
    options = ["train.precision=fp64", "model.moe.router={kind: hash, k: 2, table: balanced}"]
    assert main([str(stream_config), f"run_dir={tmp_path}/one", *options]) == 0
    arguments = [f"run_dir={tmp_path}/two", "parallel.ep=2", *options]
    torchrun(2, "-m", "moeyard.training", str(stream_config), *arguments)
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-12)


@pytest.mark.dist
def test_a_run_killed_in_mid_stream_ends_as_the_unbroken_one(tmp_path, stream_config):
    torch.set_num_threads(1)  # as in the process below
    options = [str(stream_config), "train.steps=24", "checkpoint.every=4"]
    assert main([*options, f"run_dir={tmp_path}/whole"]) == 0
    run = tmp_path / "run"
    command = [sys.executable, "-m", "moeyard.training", *options, f"run_dir={run}"]
    process = subprocess.Popen(command, env=environment(), cwd="/", stderr=subprocess.DEVNULL)
    wait_until((run / "checkpoints" / "step-00000012").exists, "a checkpoint")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "checkpoints" / "step-00000024").exists()
    assert main([*options, f"run_dir={run}"]) == 0
    assert losses(run) == losses(tmp_path / "whole")
    assert digest(run) == digest(tmp_path / "whole")


@pytest.mark.chaos
def test_two_ranks_killed_at_random_in_mid_stream_end_as_the_unbroken_ones(tmp_path, stream_config):
    unbroken = Launch(stream_config, tmp_path / "unbroken")
    unbroken.start()
    assert unbroken.wait() == 0, unbroken.log()
    launch = Launch(stream_config, tmp_path / "run")
    launch.start()
    hit = kill_at_random(launch, 6, seed=2)
    assert launch.wait() == 0, launch.log()
    print(f"\n6 kills in mid-stream: {hit}; started or resumed {launch.starts()} times")
    assert losses(launch.run_dir) == losses(unbroken.run_dir)
    assert digest(launch.run_dir) == digest(unbroken.run_dir)


def test_a_panic_of_the_reading_thread_ends_the_wait_with_a_sentence(tmp_path):
    class Panic(BaseException):
        """As libraries in Rust raise, past every ``except Exception``."""

    def open_stream(start, pause):
        raise Panic("index out of bounds")

    writer = BlockWriter(Blocks(tmp_path, 2, 4, "uint16"), open_stream, 1, StopRequest())
    with pytest.raises(DataError, match="ended with Panic: index out of bounds"):
        writer.wait(0, 0)
    writer.close()
