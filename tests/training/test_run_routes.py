"""Routes of a run: recorded by every rank, cut on resume, replayed on another number of ranks."""

import json
import logging

import pytest
import torch

from moeyard.cli import main as moeyard
from moeyard.errors import ConfigError, DataError
from moeyard.moe.routes.reader import RouteFile, read_routes
from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main
from moeyard.training.read_config import read_run_config
from moeyard.training.routes import replaying_steps, sequence_numbers
from moeyard.training.trainer import Trainer

from launch import torchrun

STEPS = 3
EXACT = ["train.precision=fp64", "parallel.backend=reference"]
SHORT = [f"train.steps={STEPS}", "train.eval_sequences=4"]


def trainer_of(config_file, run_dir, *options):
    config = read_run_config(config_file, [f"run_dir={run_dir}", *SHORT, *options])
    run_dir.mkdir()
    return Trainer(config, run_dir, Mesh())


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def replay_run(trainer, routes):
    """Train with recorded routes and return all gradients of the last step before clipping."""
    scale, kept = trainer._step.gradients.scale_, []

    def keep_and_scale(factor):
        kept[:] = [p.main_grad.clone() for p in trainer.decoder.parameters()]
        scale(factor)

    trainer._step.gradients.scale_ = keep_and_scale
    if routes is None:
        trainer.run()
    else:
        with replaying_steps(trainer._step, trainer.decoder, trainer.objective, routes):
            trainer.run()
    return kept


def test_a_replayed_run_is_the_recorded_one_bit_for_bit(config_file, tmp_path):
    options = ["train.recompute=true", "train.packing=documents", "train.accumulation=2"]
    recorder = trainer_of(config_file, tmp_path / "a", "monitor.routes={}", *options)
    gradients = replay_run(recorder, None)
    routes = read_routes(tmp_path / "a/routes")
    again = trainer_of(config_file, tmp_path / "b", *options)
    same = replay_run(again, routes)
    for key in ("loss", "balance", "z", "grad_norm", "expert_tokens", "load"):
        for a, b in zip(records(tmp_path / "a"), records(tmp_path / "b"), strict=True):
            assert a[key] == b[key], key
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    for a, b in zip(recorder.decoder.parameters(), again.decoder.parameters(), strict=True):
        assert torch.equal(a, b)

    routes.experts_NLK[:] = (routes.experts_NLK + 1) % 4
    other = trainer_of(config_file, tmp_path / "c", *options)
    replay_run(other, routes)
    rolled = [row[-1:] + row[:-1] for row in records(tmp_path / "a")[0]["expert_tokens"]]
    assert records(tmp_path / "c")[0]["expert_tokens"] == rolled, "the replayed choices count"
    assert records(tmp_path / "c")[-1]["loss"] != records(tmp_path / "a")[-1]["loss"]


def test_a_run_with_noise_and_capacity_replays_bit_for_bit(config_file, tmp_path):
    router = "{kind: noisy, k: 2, second_expert: random, jitter: 0.1, capacity: {factor: 0.75}}"
    options = [f"model.moe.router={router}", "train.packing=documents"]
    recorder = trainer_of(config_file, tmp_path / "a", "monitor.routes={}", *options)
    gradients = replay_run(recorder, None)
    again = trainer_of(config_file, tmp_path / "b", *options)
    same = replay_run(again, read_routes(tmp_path / "a/routes"))
    for a, b in zip(records(tmp_path / "a"), records(tmp_path / "b"), strict=True):
        assert a["loss"] == b["loss"] and a["load"] == b["load"]
        assert all(layer["dropped"] > 0 for layer in a["load"])
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    for a, b in zip(recorder.decoder.parameters(), again.decoder.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, config_file):
    """The folder of a run on two ranks that split the experts."""
    folder = tmp_path_factory.mktemp("two") / "run"
    options = [*EXACT, f"run_dir={folder}", "monitor.routes={}", "parallel.ep=2"]
    torchrun(2, "-m", "moeyard.training", str(config_file), *options)
    return folder


@pytest.mark.dist
def test_two_ranks_log_the_same_routing_as_one(two_ranks, config_file, tmp_path):
    assert main([str(config_file), f"run_dir={tmp_path}/one", *EXACT]) == 0
    for one, two in zip(records(tmp_path / "one"), records(two_ranks), strict=True):
        assert one["expert_tokens"] == two["expert_tokens"]
        assert [sum(layer) for layer in two["expert_tokens"]] == [two["step_tokens"] * 2] * 2
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-12)
        if "eval_loss" in one:
            assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-12)


@pytest.mark.dist
def test_one_process_replays_what_two_ranks_recorded(two_ranks, config_file, tmp_path):
    files = sorted((two_ranks / "routes").iterdir())
    assert [file.name for file in files] == ["rank-0.routes", "rank-1.routes"]
    routes = read_routes(two_ranks / "routes")
    assert len(routes) == 6 * 8 * 32 == 2 * len(RouteFile(files[0]).read())
    assert sorted(set(routes.sequences_N.tolist())) == [32 * window for window in range(8)]

    replay_run(trainer_of(config_file, tmp_path / "one", *EXACT), routes)
    for a, b in zip(records(tmp_path / "one"), records(two_ranks)[:STEPS], strict=True):
        assert a["expert_tokens"] == b["expert_tokens"]
        for key in ("loss", "balance", "z", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-12, abs=0), key

    missing = routes.select(routes.steps_N != 2)
    with pytest.raises(DataError, match="have no rows"):
        replay_run(trainer_of(config_file, tmp_path / "x", *EXACT), missing)
    routes.tokens_N[5] += 1
    with pytest.raises(DataError, match="position 5 of sequence 0, but the batch has"):
        replay_run(trainer_of(config_file, tmp_path / "y", *EXACT), routes)


def test_a_resumed_run_repeats_no_row_and_its_export_has_its_identity(
    config_file, tmp_path, capsys
):
    run = tmp_path / "run"
    options = [str(config_file), f"run_dir={run}", "monitor.routes={every: 2}", "train.steps=8"]
    whole = tmp_path / "whole"
    assert main([*options, f"run_dir={whole}"]) == 0
    assert main([*options, "train.steps=3"]) == 0  # checkpoint at 3
    file = run / "routes/rank-0.routes"
    stale = RouteFile(whole / "routes/rank-0.routes")
    assert sorted(set(stale.read().steps_N.tolist())) == [2, 4, 6, 8]
    # As if the run had been killed later: rows of steps that are repeated, and half a chunk.
    data = (whole / "routes/rank-0.routes").read_bytes()
    file.write_bytes(data[:-40])
    (run / "routes/rank-1.routes").write_bytes(data)  # of an earlier start on two ranks
    assert main([*options, "train.eval_sequences=4"]) == 0
    assert file.read_bytes() == data
    found = RouteFile(run / "routes/rank-1.routes")
    assert set(found.read().steps_N.tolist()) == {2}

    assert main([*options, "monitor.routes.weights=false", "train.steps=9"]) == 2
    assert "was recorded with other settings or from other data; move it" in capsys.readouterr().err
    assert moeyard(["generate", str(run), "ab", "--record-routes", f"{tmp_path}/g.routes"]) == 0
    RouteFile(tmp_path / "g.routes").check_model(read_model(run))
    assert RouteFile(tmp_path / "g.routes").header.model.architecture == (
        RouteFile(file).header.model.architecture
    )
    assert moeyard(["trace", "compare", str(run), str(file)]) == 2
    assert "are those of training, whose weights change" in capsys.readouterr().err


def read_model(run_dir):
    from moeyard.serving.loading import load

    (folder,) = (run_dir / "exports").iterdir()
    return load(folder).config


def test_a_full_file_or_disk_never_ends_a_run(config_file, tmp_path, caplog, monkeypatch):
    first = trainer_of(config_file, tmp_path / "a", "monitor.routes={max_bytes: 15000}")
    with caplog.at_level(logging.WARNING):
        first.run()
    assert "has reached monitor.routes.max_bytes; later steps are not recorded" in caplog.text
    assert set(read_routes(tmp_path / "a/routes").steps_N.tolist()) == {1}
    assert not first._step.before_forward and not first.decoder._forward_hooks

    caplog.clear()
    second = trainer_of(config_file, tmp_path / "b", "monitor.routes={}")

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moeyard.moe.routes.writer.RouteWriter.flush", full)
    with caplog.at_level(logging.WARNING):
        second.run()
    assert "RouteRecording failed ([Errno 28] No space left on device); training goes on" in (
        caplog.text
    )
    assert not second._step.before_forward and not second.decoder._forward_hooks
    assert records(tmp_path / "b")[-1]["step"] == STEPS


def test_sequences_have_the_same_numbers_on_any_number_of_ranks():
    lengths, rows_W = [3, 4, 1, 2, 5], [7, 3, 5]  # windows of 8, not all full
    whole = sequence_numbers(lengths, rows_W, 4, 8)
    assert whole == [32, 35, 40, 41, 48]
    assert sequence_numbers(lengths[:2], rows_W[:1], 4, 8) == whole[:2]
    assert sequence_numbers(lengths[2:], rows_W[1:], 5, 8) == whole[2:]


def test_a_dense_model_has_no_routes(config_file, tmp_path):
    options = [f"run_dir={tmp_path}/run", "monitor.routes={}", "model.moe=null", "model.d_ff=8"]
    with pytest.raises(ConfigError, match="is given, but the model has no experts"):
        read_run_config(config_file, options)
