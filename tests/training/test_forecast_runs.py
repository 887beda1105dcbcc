"""Runs on series: what they measure, resume, export and refuse."""

import json

import pytest
import torch
import yaml

from moeyard.cli import main as command
from moeyard.errors import ConfigError
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routes.reader import read_routes
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.filling import fill_model
from moeyard.training.checkpoints.export import export

from small_series import values, write
from small_trainer import check_resumed, finished, metrics, trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    source = write(folder / "series.csv", missing=[(40, "flow"), (41, "flow"), (90, "level")])
    written = values(source, folder / "unset")
    written["data"]["split"] = [0.6, 0.2, 0.2]
    (folder / "run.yaml").write_text(yaml.safe_dump(written))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return finished(
        config, tmp_path_factory.mktemp("whole"), "monitor.routes={}", "train.eval_every=3"
    )


def test_a_run_measures_its_loss_its_forecasts_and_the_load_of_experts(whole):
    run, run_dir = whole
    last = metrics(run_dir)[-1]
    held_out = run._data.held_out
    assert len(held_out) == 2 * (24 - 6 + 1)
    windows = held_out.rows(range(len(held_out)))
    with torch.no_grad():
        scored = run.decoder.eval().score(windows.values_BL, windows.observed_BL)
        ahead_BH = run.decoder.predict(windows.values_BL[:, :-6], windows.observed_BL[:, :-6], 6)
    errors = (ahead_BH.mean_BH - windows.values_BL[:, -6:])[windows.observed_BL[:, -6:]]
    assert len(errors) == 6 * len(held_out) - 6  # a point that was not observed, in six windows
    assert last["eval_mse"] == pytest.approx(float(errors.square().mean()), rel=1e-4)
    assert last["eval_mae"] == pytest.approx(float(errors.abs().mean()), rel=1e-4)
    assert last["eval_loss"] == pytest.approx(float(scored.loss_sum) / len(held_out), rel=1e-4)
    rows = run.objective.num_tokens(range(5, 6))
    assert rows == 8 * 19 and last["tokens"] == 6 * rows
    assert [sum(counts) for counts in last["expert_tokens"]] == [2 * rows] * 2
    assert len(read_routes(run_dir / "routes").tokens_N) == 6 * rows


def test_eval_says_what_a_run_without_text_has_measured(whole, capsys):
    assert command(["eval", str(whole.folder)]) == 2
    said, last = capsys.readouterr().err, metrics(whole.folder)[-1]
    assert f"eval_mse={last['eval_mse']:.4f}" in said and "in step 6" in said
    assert "a model of kind time_moe, which continues no text" in said and said.count("\n") == 1


@pytest.mark.parametrize("half", ['{"step": 7, "phases_s": {"a": 1}', "{", '{"a": {"b": 1}\n\n'])
def test_eval_reads_past_the_half_line_of_a_killed_run(tmp_path, capsys, half):
    (tmp_path / "config.yaml").write_text("model: {kind: time_moe}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "eval_mse": 0.5}\n' + half)
    assert command(["eval", str(tmp_path)]) == 2
    assert "measured eval_mse=0.5000 in step 6, and" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_learns_waves(config, tmp_path):
    trainer(config, tmp_path / "run", "train.steps=300", "train.log_every=50").run()
    assert metrics(tmp_path / "run")[-1]["eval_mse"] < 0.2  # a constant has 1


def test_a_resumed_run_ends_as_one_that_was_not_stopped(config, whole, tmp_path):
    check_resumed(config, whole, tmp_path, "monitor.routes={}", "train.eval_every=3")


def test_exports_have_the_authors_names_and_forecast_the_same_also_offloaded(whole, tmp_path):
    run, run_dir = whole
    export(run_dir, tmp_path / "model")
    folder = ModelFolder(tmp_path / "model")
    assert folder.values["model_type"] == "time_moe" and folder.check() is None
    assert "model.layers.1.ffn_layer.experts.3.gate_proj.weight" in folder.files
    scales = json.loads((tmp_path / "model" / "series.json").read_text())
    assert set(scales["columns"]) == {"level", "flow"} and scales["context"] == 20
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    windows = run._data.held_out.rows(range(5))
    with torch.no_grad():
        forecasts = [run.decoder.eval().predict(*windows[:2], 9).mean_BH]
        for memory in (None, "30%"):
            filled = fill_model(
                ModelFolder(tmp_path / "model"),
                torch.float32,
                memory,
                StoreOptions(),
                torch.device("cpu"),
            )
            assert (filled.store is None) == (memory is None)
            forecasts.append(filled.model.eval().predict(*windows[:2], 9).mean_BH)
    assert torch.equal(forecasts[1], forecasts[2])
    torch.testing.assert_close(*forecasts[:2], rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_from_a_folder(config, whole, tmp_path):
    export(whole[1], tmp_path / "model")
    start = [f"start_from={tmp_path / 'model'}", "model={}"]
    run = trainer(config, tmp_path / "run", *start)
    assert run.decoder.config.kind == "time_moe"
    for name, weight in whole[0].decoder.state_dict().items():
        assert torch.equal(run.decoder.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.horizon=20", "data.context=50"], "data.horizon is 20 after a context of 50 points"),
        (["parallel.pp=2"], "model.kind is time_moe, which is not split into stages"),
        (["train.parameters=lora"], "model.kind is time_moe, whose weights have no low-rank"),
        (["train.sequence_length=65"], "train.sequence_length is 65, but model.max_positions"),
        (["data={format: text}"], "trains models of kind decoder, but model.kind is time_moe"),
    ],
)
def test_runs_that_cannot_work_are_refused(config, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        trainer(config, tmp_path / "run", *overrides)


def test_another_model_cannot_be_trained_on_series(config, tmp_path):
    written = yaml.safe_load(config.read_text())
    written["model"] = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 8}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError, match=r"which trains models of kind time_moe.*is decoder"):
        trainer(tmp_path / "run.yaml", tmp_path / "run")
