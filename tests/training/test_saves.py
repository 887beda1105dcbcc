"""Saves that fail, checkpoints that lack something, metadata that lies, and requests to stop."""

import json
import os
import pickle
import signal
import struct

import pytest
import torch

from moeyard.errors import CheckpointError
from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main
from moeyard.training.checkpoints import checkpoint
from moeyard.training.checkpoints.checkpoint import Checkpoints, StoredTensors
from moeyard.training.checkpoints.dcp_reader import SafeFileSystemReader
from moeyard.training.checkpoints.files import read_state, verify
from moeyard.training.observers.metrics_log import MetricsLog
from moeyard.training.stop import StopRequest

from broken_saves import fail_writes, steps

EVERY_STEP = ("checkpoint.every=1", "train.steps=5")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def train(config_file, run, *overrides) -> int:
    return main([str(config_file), f"run_dir={run}", *overrides])


def test_training_goes_on_after_saves_that_fail(run, config_file, monkeypatch, caplog):
    fail_writes(monkeypatch, {2, 3})
    assert train(config_file, run, *EVERY_STEP, "checkpoint.keep=9") == 0
    assert steps(run) == ["step-00000001", "step-00000004", "step-00000005"]
    warnings = [r.message for r in caplog.records if "Training goes on" in r.message]
    assert len(warnings) == 2 and "1 of 3 failures in a row" in warnings[0]
    assert all("could not be written (no space left on device)" in line for line in warnings)


@pytest.mark.parametrize(
    "which",
    [
        pytest.param({2, 3, 4}, id="three_in_a_row", marks=pytest.mark.slow),
        pytest.param({5}, id="the_last"),
    ],
)
def test_the_run_ends_with_a_sentence_where_saves_keep_failing(
    run, config_file, monkeypatch, capsys, which
):
    fail_writes(monkeypatch, which)
    assert train(config_file, run, *EVERY_STEP) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: checkpoint ") and f"step-{max(which):08d}" in said
    assert "(no space left on device), but the previous one is untouched" in said
    assert not any(name.startswith(".tmp") for name in steps(run)), "its space is given back"
    assert (run / "latest").read_text().strip() == steps(run)[-1]


def test_a_checkpoint_without_another_hosts_shard_is_not_committed(run, monkeypatch):
    write_state = checkpoint.write_state

    def elsewhere(folder, step, state):
        write_state(folder, step, state)
        next(folder.glob("*.distcp")).unlink()

    monkeypatch.setattr(checkpoint, "write_state", elsewhere)
    with pytest.raises(CheckpointError, match=r"lacks __0_0\.distcp, which a rank wrote elsewhere"):
        Checkpoints(run, Mesh(), 2).save(1, {"weight/a": torch.ones(3)}, {})
    assert steps(run) == []


def test_latest_is_ready_before_a_checkpoint_counts(run):
    run.mkdir()
    (run / ".latest.tmp").mkdir()  # cannot be written
    with pytest.raises(CheckpointError):
        Checkpoints(run, Mesh(), 2).save(1, {"weight/a": torch.ones(3)}, {})
    assert steps(run) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    Checkpoints(folder, Mesh(), 2).save(1, {"weight/a": torch.arange(40.0)}, {})
    return folder / "checkpoints" / "step-00000001"


def edit(change):
    def payload(data: bytes) -> bytes:
        metadata = pickle.loads(data)
        change(metadata, next(iter(metadata.storage_data.values())))
        return pickle.dumps(metadata)

    return payload


def entry(metadata):
    return metadata.state_dict_metadata["weight/a"]


LIES = {
    "not_a_pickle": lambda data: b"hello",
    "nothing": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "endless_bytes": lambda data: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "another_object": lambda data: pickle.dumps({"storage_data": {}}),
    "a_shape_beyond_memory": edit(lambda m, _: setattr(entry(m), "size", torch.Size([1 << 50]))),
    "a_negative_shape": edit(lambda m, _: setattr(entry(m), "size", torch.Size([-4]))),
    "a_place_before_the_file": edit(lambda _, info: setattr(info, "offset", -5)),
    "a_length_beyond_the_file": edit(lambda _, info: setattr(info, "length", 1 << 50)),
    "a_file_elsewhere": edit(lambda _, info: setattr(info, "relative_path", "../../passwd")),
    "no_type": edit(lambda m, _: setattr(entry(m).properties, "dtype", "float")),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_is_refused_with_a_sentence(saved, tmp_path, lie):
    folder = tmp_path / "step"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert verify(folder) is None
    (folder / ".metadata").write_bytes(LIES[lie]((saved / ".metadata").read_bytes()))
    with pytest.raises(CheckpointError, match="is not metadata of a checkpoint"):
        SafeFileSystemReader(folder).read_metadata()
    with pytest.raises(CheckpointError):
        StoredTensors(folder)


STATES = {
    "not_json": "{",
    "a_list": "[1]",
    "deep": "[" * 100_000,
    "no_version": "{}",
    "no_model": json.dumps({"version": 1, "step": 3}),
    "a_step_beyond_all": json.dumps({"version": 1, "step": 10**30}),
}


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_no_run_writes_is_refused_with_a_sentence(tmp_path, state):
    (tmp_path / "state.json").write_text(STATES[state])
    with pytest.raises(CheckpointError, match=r"state\.json .*; restore the checkpoint"):
        read_state(tmp_path)


def test_records_wait_for_room_on_a_full_disk(tmp_path, caplog):
    log = MetricsLog(tmp_path, resume_step=0)
    file, log._file = log._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    log.record({"step": 1})
    log.record({"step": 2})
    log._file.close()
    log._file = file
    log.record({"step": 3})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert [r.message for r in caplog.records if "no space left on device" in r.message][1:] == []


@pytest.fixture
def handlers():
    """Put back what signals did."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_asks_for_a_stop(handlers, name):
    stop = StopRequest()
    stop.listen()
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.signal_name == name


def test_what_nohup_ignores_is_no_request(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signal_name is None
