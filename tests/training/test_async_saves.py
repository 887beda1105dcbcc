"""Checkpoints that are written while training goes on: right values, failures, waits and stops."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from moeyard.errors import CheckpointError, TrainingError
from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main
from moeyard.training.checkpoints import writer
from moeyard.training.checkpoints.checkpoint import Checkpoints, StoredTensors
from moeyard.training.checkpoints.files import verify
from moeyard.training.checkpoints.parts import DefaultSavePlanner
from moeyard.training.saves import LONG_WAIT_S, Saves
from moeyard.training.step import TrainStep

from broken_saves import before_writes, fail_writes, steps
from kills import digest

ASYNCHRONOUS = ("checkpoint.asynchronous=true", "checkpoint.every=1", "checkpoint.keep=9")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def train(config_file, run, *overrides) -> int:
    return main([str(config_file), f"run_dir={run}", "train.steps=5", *ASYNCHRONOUS, *overrides])


def unexpected(error: BaseException) -> None:
    raise AssertionError from error


def test_a_save_has_the_values_of_its_moment_and_the_next_one_uses_its_memory(run, monkeypatch):
    arrived, go_on, plans = threading.Event(), threading.Event(), []
    before_writes(monkeypatch, lambda _: arrived.set() or go_on.wait(60))
    agree = DefaultSavePlanner.create_global_plan
    monkeypatch.setattr(
        DefaultSavePlanner,
        "create_global_plan",
        lambda self, all_plans: plans.append(1) or agree(self, all_plans),
    )
    checkpoints = Checkpoints(run, Mesh(), 9)
    tensors = {"weight/a": torch.arange(40.0), "weight/b": torch.ones(3, 5)}
    places = []
    for step in (1, 2, 3):
        if step == 3:
            tensors["weight/c"] = torch.zeros(2)  # as when an expert comes from another rank
        arrived.clear()
        go_on.clear()
        checkpoints.start(step, tensors, {}, unexpected)
        assert arrived.wait(60)
        places.append([copy.data_ptr() for copy in checkpoints._copies._copies.values()])
        for tensor in tensors.values():
            tensor += 1
        there = [f"step-{done:08d}" for done in range(1, step)]
        assert steps(run) == [f".tmp-step-{step:08d}", *there], "not there before it is written"
        go_on.set()
        checkpoints.wait()
    for step in (1, 2, 3):
        found = StoredTensors(run / f"checkpoints/step-{step:08d}")
        assert found["weight/a"].equal(torch.arange(40.0) + step - 1)
    assert places[0] == places[1] == places[2][:2]
    assert len(plans) == 2, "agreed on once, and again with other tensors"


def test_an_asynchronous_run_writes_what_another_one_writes(run, config_file, tmp_path):
    assert train(config_file, run) == 0
    assert train(config_file, tmp_path / "plain", "checkpoint.asynchronous=false") == 0
    assert steps(run) == steps(tmp_path / "plain") == [f"step-{n:08d}" for n in range(1, 6)]
    for name in steps(run):
        found = StoredTensors(run / "checkpoints" / name)
        expected = StoredTensors(tmp_path / "plain" / "checkpoints" / name)
        assert all(found[key].equal(expected[key]) for key in expected)
        assert verify(run / "checkpoints" / name) is None
    assert digest(run) == digest(tmp_path / "plain")
    assert (run / "latest").read_text() == "step-00000005\n"


def test_training_goes_on_after_asynchronous_saves_that_fail(run, config_file, monkeypatch, caplog):
    fail_writes(monkeypatch, {2, 3})
    assert train(config_file, run) == 0
    assert steps(run) == ["step-00000001", "step-00000004", "step-00000005"]
    warnings = [r.message for r in caplog.records if "Training goes on" in r.message]
    assert [f"({n} of 3 failures in a row)" in line for n, line in enumerate(warnings, 1)] == [
        True,
        True,
    ]
    assert all("could not be written (no space left on device)" in line for line in warnings)


@pytest.mark.parametrize("which", [{1, 2, 3}, {4, 5}], ids=["three_in_a_row", "the_last"])
def test_the_run_ends_with_a_sentence_where_asynchronous_saves_keep_failing(
    run, config_file, monkeypatch, capsys, which
):
    fail_writes(monkeypatch, which)
    assert train(config_file, run) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: checkpoint ") and f"step-{max(which):08d}" in said
    assert "(no space left on device), but the previous one is untouched" in said
    assert not any(name.startswith(".tmp") for name in steps(run)), "its space is given back"


def test_the_last_save_is_tried_after_two_that_failed(run, config_file, monkeypatch):
    fail_writes(monkeypatch, {2, 3, 4})
    assert train(config_file, run) == 0
    assert steps(run) == ["step-00000001", "step-00000005"]


def test_a_folder_that_cannot_be_written_ends_the_run_with_a_sentence(run, config_file, capsys):
    run.mkdir()
    (run / "checkpoints").write_text("a file in the place of the folder")
    assert train(config_file, run) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "step-00000003 could not be written (file exists)" in said


def test_a_save_that_is_due_early_waits_and_says_so(run, config_file, monkeypatch, caplog):
    waiting = threading.Event()
    wait = writer.Writer.wait

    def noted(self):
        waiting.set()
        wait(self)

    def slow(number):
        if number == 2:
            waiting.clear()
            assert waiting.wait(60)
            time.sleep(2 * LONG_WAIT_S)

    monkeypatch.setattr(writer.Writer, "wait", noted)
    before_writes(monkeypatch, slow)
    assert train(config_file, run) == 0
    said = [r.message for r in caplog.records if "waited" in r.message]
    assert any(line.startswith("the save of step 3 waited") for line in said), said
    assert steps(run) == [f"step-{n:08d}" for n in range(1, 6)]


@pytest.fixture
def handlers():
    """Put back what signals did."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_during_a_save_ends_with_that_save_and_one_of_the_last_step(
    run, config_file, monkeypatch, handlers, capsys
):
    before_writes(monkeypatch, lambda number: number == 2 and os.kill(os.getpid(), signal.SIGTERM))
    assert train(config_file, run, "train.steps=1000000") == 0
    assert "event=stopped reason=SIGTERM" in capsys.readouterr().err
    assert "step-00000002" in steps(run)
    assert all(verify(path) is None for path in (run / "checkpoints").iterdir())
    last = int((run / "latest").read_text().strip().removeprefix("step-"))
    records = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] == last


def test_a_run_that_ends_with_an_error_finishes_the_save_under_way(run, config_file, monkeypatch):
    ending = threading.Event()
    end, step = Saves.end, TrainStep.run

    def ends(self, done, error):
        ending.set()
        end(self, done, error)

    def breaks(self, number, stop):
        if number == 2:
            raise TrainingError("made up")
        return step(self, number, stop)

    monkeypatch.setattr(Saves, "end", ends)
    monkeypatch.setattr(TrainStep, "run", breaks)
    before_writes(monkeypatch, lambda number: number == 2 and ending.wait(60))
    assert train(config_file, run) == 1
    assert steps(run) == ["step-00000001", "step-00000002"]


def test_each_rank_checks_the_hashes_of_its_share(run):
    Checkpoints(run, Mesh(), 2).save(1, {"weight/a": torch.ones(3)}, {})
    folder = run / "checkpoints" / "step-00000001"
    for name in (".metadata", "__0_0.distcp", "state.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        found = [verify(folder, rank, 2) for rank in range(2)]
        assert f"{name} does not match its hash" in found
        assert name == ".metadata" or found.count(None) == 1, "one rank hashes it"
        (folder / name).write_bytes(whole)
    assert [verify(folder, rank, 2) for rank in range(2)] == [None, None]


def test_an_error_of_the_disk_while_hashing_is_a_problem_of_the_checkpoint(run, monkeypatch):
    Checkpoints(run, Mesh(), 2).save(1, {"weight/a": torch.ones(3)}, {})

    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moeyard.training.checkpoints.files.sha256_of", broken)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        Checkpoints(run, Mesh(), 2).newest_whole()
