"""Rounds of alignment: the reward model, the pairs it picks, runs that learn them."""

import json
import signal

import pytest
import torch
import yaml
from safetensors import safe_open

from moeyard.cli import main as command
from moeyard.errors import DataError
from moeyard.training import program
from moeyard.training.alignment import fit_reward
from moeyard.training.alignment.fit_reward import fit_reward_model, outcomes
from moeyard.training.alignment.reward import (
    new_reward_model,
    read_reward_model,
    save_reward_model,
)
from moeyard.training.alignment.sample_pairs import best_and_worst
from moeyard.training.data.session_log import read_log
from moeyard.training.data.session_rows import find_sessions
from moeyard.training.formats.sessions import SessionsConfig
from moeyard.training.work import LongWork

import clicks
from small_trainer import finished


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return clicks.write(tmp_path_factory.mktemp("align"))


@pytest.fixture(scope="module")
def sessions(values):
    section = SessionsConfig(**values["data"])
    log = read_log(clicks.Path(section.source), "data.source", clicks.small_table().number)
    return find_sessions(log, section)


def test_the_reward_model_knows_more_than_the_means(sessions, monkeypatch):
    monkeypatch.setattr(fit_reward, "MOST_EPOCHS", 3)
    fitted = fit_reward_model(sessions, clicks.small_table(), 8.0, seed=0)
    again = fit_reward_model(sessions, clicks.small_table(), 8.0, seed=0)
    assert fitted.loss == again.loss
    monkeypatch.setattr(fit_reward, "MOST_EPOCHS", 0)
    unfitted = fit_reward_model(sessions, clicks.small_table(), 8.0, seed=0)
    assert fitted.loss < unfitted.loss and fitted.base_loss == unfitted.base_loss


def test_outcomes_are_what_the_log_says(sessions):
    chosen = sessions._replace(
        watch_s_CI=torch.tensor([[9.0, 1, 1], [9, 9, 9], [1, 1, 1]]).numpy(),
        liked_CI=torch.tensor([[True, False, False], [True, True, False], [False] * 3]).numpy(),
    )
    found = outcomes(chosen, 5.0, torch.arange(3).numpy())
    wanted = [[0, 1 / 3, 1 / 3], [1, 1, 2 / 3], [0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_rewards_depend_on_the_user_and_on_the_other_items(tmp_path):
    table = clicks.small_table()
    model = new_reward_model(table, seed=1).eval()
    history_N, lengths = torch.tensor([1, 2, 3, 9]), (3, 1)
    sessions = torch.tensor([[4, 5, 6], [4, 5, 6]])
    both = model.reward(history_N, lengths, sessions)
    assert both[0] != both[1]
    alone = model.reward(history_N[3:], (1,), sessions[:1])
    torch.testing.assert_close(both[1:], alone)
    torch.testing.assert_close(model.reward(history_N[3:], (1,), sessions[:1].flip(1)), alone)
    save_reward_model(model, tmp_path / "x.safetensors")
    again = read_reward_model(tmp_path / "x.safetensors", table)
    assert torch.equal(again.reward(history_N, lengths, sessions), both)
    with pytest.raises(DataError, match="is no reward model of these items"):
        read_reward_model(tmp_path / "x.safetensors", clicks.small_table(20))


def test_best_and_worst_are_of_sessions_that_count():
    rewards = torch.tensor([[1.0, 3, 2, 9], [2, 2, 0, 1], [1, 1, 1, 0]])
    counts = torch.tensor([[True, True, True, False], [True] * 4, [True, True, True, False]])
    has_pair, picks = best_and_worst(rewards, counts)
    assert picks.tolist() == [[1, 0], [0, 2], [0, 0]] and has_pair.tolist() == [True, True, False]


@pytest.fixture(scope="module")
def finished_run(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return finished(folder / "run.yaml", folder).folder


def rounds_of(err):
    return [line for line in err.splitlines() if line.startswith("event=round ")]


def test_rounds_go_on_where_they_were_and_learn_their_pairs(finished_run, tmp_path, capsys):
    run_dir, target = finished_run, tmp_path / "rounds"
    how = ["--share", "0.5", "--beams", "4", "train.steps=2", "data.alignment.weight=2"]
    capsys.readouterr()
    assert command(["align", str(run_dir), str(target), "--rounds", "1", *how]) == 0
    err = capsys.readouterr().err
    assert len(rounds_of(err)) == 1 and "event=reward loss=" in err and "event=pairs pairs=" in err
    before = (target / "reward.safetensors").stat().st_mtime_ns
    assert command(["align", str(run_dir), str(target), "--rounds", "2", *how]) == 0
    err = capsys.readouterr().err
    assert len(rounds_of(err)) == 2 and "event=reward" not in err and err.count("event=pairs") == 1
    assert (target / "reward.safetensors").stat().st_mtime_ns == before
    second = yaml.safe_load((target / "round-2" / "run" / "config.yaml").read_text())
    assert second["start_from"].startswith(str(target / "round-1" / "run" / "exports"))
    assert second["data"]["alignment"]["pairs"] == str(target / "round-2" / "pairs.safetensors")
    first = (target / "round-1" / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert {"eval_loss", "eval_recall"} <= json.loads(first).keys()
    with safe_open(target / "round-1" / "pairs.safetensors", "pt") as file:
        rewards = file.get_tensor("rewards_P2")
    assert (rewards[:, 0] > rewards[:, 1]).all()


@pytest.mark.parametrize(
    "during", ["reading the log", "fitting the reward model", "generating sessions"]
)
def test_a_signal_ends_a_round_and_leaves_what_is_whole(
    finished_run, tmp_path, capsys, monkeypatch, during
):
    advance = LongWork.advance

    def interrupted(work, *given, **facts):
        if work._event == during:
            signal.raise_signal(signal.SIGINT)
        advance(work, *given, **facts)

    monkeypatch.setattr(LongWork, "advance", interrupted)
    target = tmp_path / "rounds"
    how = ["--rounds", "1", "--share", "0.5", "--beams", "4", "train.steps=2"]
    assert command(["align", str(finished_run), str(target), *how]) != 0
    assert f"stopped by SIGINT while {during}" in capsys.readouterr().err
    assert not (target / "round-1" / "pairs.safetensors").exists()
    assert not (target / "round-1" / "run" / "checkpoints").exists()
    assert (target / "reward.safetensors").exists() == (during == "generating sessions")


def test_a_signal_in_the_last_step_of_a_round_begins_no_other(
    finished_run, tmp_path, capsys, monkeypatch
):
    class Interrupted(program.Trainer):
        def run(self):
            super().run()
            signal.raise_signal(signal.SIGTERM)

    target = tmp_path / "rounds"
    how = [*("--share", "0.5", "--beams", "4"), "train.steps=1", "data.alignment.weight=0"]
    monkeypatch.setattr(program, "Trainer", Interrupted)
    assert command(["align", str(finished_run), str(target), "--rounds", "2", *how]) != 0
    err = capsys.readouterr().err
    assert len(rounds_of(err)) == 1 and "stopped before round 2; go on with: moeyard align" in err
    assert not (target / "round-2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "0"], "--share is 0.0; use a number above 0, at most 1"),
        (["--beams", "1"], "--beams is 1; use a number from 2 upwards"),
        (["--rounds", "0"], "--rounds is 0; use a number from 1 upwards"),
        ([], "which is no run; give one"),
    ],
)
def test_rounds_that_cannot_work_are_refused(tmp_path, capsys, arguments, message):
    assert command(["align", str(tmp_path / "none"), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
