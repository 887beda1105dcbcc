"""Folders of series models: opened, offloaded, asked by command, served, served with Ray."""

import csv
import json
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import moeyard
from moeyard.cli import main
from moeyard.configuration import validate_config
from moeyard.errors import ConfigError, ModelFileError
from moeyard.parallel.mesh import Mesh
from moeyard.serving.hosting import check_model, open_server
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server_budgets import with_budgets
from moeyard.training.checkpoints.export import export_newest
from moeyard.training.config import RunConfig
from moeyard.training.trainer import Trainer

import small_series
from http_calls import call
from server_process import serving

HORIZON = 6


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of a step, whose experts are no longer alike."""
    folder = tmp_path_factory.mktemp("series")
    source = small_series.write(folder / "series.csv")
    values = small_series.values(source, folder / "run")
    values["train"] = {**small_series.TRAIN, "steps": 1}
    (folder / "run").mkdir()
    Trainer(validate_config(RunConfig, values), folder / "run", Mesh()).run()
    return folder / "run"


@pytest.fixture(scope="module")
def table(run_dir):
    return run_dir.parent / "series.csv"


@pytest.fixture(scope="module")
def folder(run_dir):
    return export_newest(run_dir)


@pytest.fixture(scope="module")
def columns(table):
    """The columns of the table by their names."""
    rows = list(csv.DictReader(table.read_text().splitlines()))
    return {name: [float(row[name]) for row in rows] for name in ("level", "flow")}


def test_a_run_s_forecaster_scales_as_its_training_did(folder, columns):
    forecaster = moeyard.load_forecaster(folder)
    assert isinstance(forecaster, moeyard.Forecaster) and "4 a layer" in repr(forecaster)
    scales = json.loads((folder / "series.json").read_text())
    assert forecaster.trained_on.context == scales["context"]
    found = forecaster(list(columns.values()), HORIZON, columns=list(columns))
    for (name, values), forecast in zip(columns.items(), found, strict=True):
        mean, std = scales["columns"][name]["mean"], scales["columns"][name]["std"]
        read = torch.tensor([values[-scales["context"] :]], dtype=torch.float64)
        scaled = ((read - mean) / std).float()
        ahead = forecaster.model.predict(scaled, torch.ones(scaled.shape).bool(), HORIZON)
        np.testing.assert_allclose(forecast.mean, ahead.mean_BH[0].numpy() * std + mean, rtol=1e-6)
        assert forecast.quantiles is None


def test_a_forecast_does_not_depend_on_the_others_in_the_batch(folder, columns):
    forecaster = moeyard.load_forecaster(folder)
    series = [values[start : start + 30] for values in columns.values() for start in range(5)]
    together = forecaster(series, HORIZON)
    for one, forecast in zip(series, together, strict=True):
        np.testing.assert_allclose(forecaster(one, HORIZON)[0].mean, forecast.mean, rtol=1e-5)


def test_offloaded_experts_forecast_the_same_bits(folder, columns):
    whole, part = (moeyard.load_forecaster(folder, expert_memory=m) for m in (None, "30%"))
    assert "on disk" in repr(part) and "on disk" not in repr(whole)
    series = [[*values, np.nan, 3.0] for values in columns.values()]
    for one, other in zip(whole(series, HORIZON), part(series, HORIZON), strict=True):
        np.testing.assert_array_equal(one.mean, other.mean)


def test_each_kind_of_model_is_opened_by_its_own_function(folder, model_folder):
    with pytest.raises(ConfigError, match=r"use moeyard forecast or moeyard.load_forecaster"):
        moeyard.load(folder)
    with pytest.raises(ConfigError, match="has a decoder, but a model of series is needed"):
        moeyard.load_forecaster(model_folder)


@pytest.mark.parametrize(
    "text", ["{", '{"columns": {"a": {"mean": 1, "std": 0}}}', '{"context": 0}', "[]"]
)
def test_a_damaged_file_of_scales_is_refused(folder, tmp_path, text):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "series.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"series.json cannot be read"):
        moeyard.load_forecaster(copy)
    (copy / "series.json").unlink()
    assert moeyard.load_forecaster(copy).trained_on.context is None


def test_the_command_opens_a_run_and_continues_its_table(run_dir, table, columns, folder, capsys):
    asked = ["forecast", str(run_dir), str(table), "--horizon", str(HORIZON)]
    assert main(asked) == 0
    whole = capsys.readouterr().out
    assert main([*asked, "--expert-memory", "30%"]) == 0
    assert capsys.readouterr().out == whole
    header, *rows = csv.reader(whole.splitlines())
    assert header == ["date", "level", "flow"] and rows[0][0] == "2024-01-06 00:00"
    forecaster = moeyard.load_forecaster(folder)
    found = forecaster(list(columns.values()), HORIZON, columns=list(columns))
    for place, forecast in enumerate(found, start=1):
        np.testing.assert_allclose([float(r[place]) for r in rows], forecast.mean, rtol=1e-9)
    assert main(["forecast", str(run_dir), str(table), "--horizon", "64"]) == 2
    assert "horizon is 64, but the model takes 64 points" in capsys.readouterr().err
    assert main([*asked, "--quantiles", "0.5"]) == 2
    assert "forecasts points and has none; leave it out" in capsys.readouterr().err


def test_a_served_folder_answers_as_the_forecaster_and_counts_its_experts(folder, columns):
    args, _ = with_budgets(ServeArgs(model=str(folder), expert_memory="30%", api_key="secret"))
    check_model(args, runs_here=True)
    server = open_server(args, "replica")
    try:
        series = list(columns.values())
        body = {"series": series, "horizon": HORIZON, "columns": list(columns)}
        answer = call(server, "POST", "/v1/forecast", json=body).json()
        found = moeyard.load_forecaster(folder)(series, HORIZON, columns=list(columns))
        for one, forecast in zip(answer["data"], found, strict=True):
            np.testing.assert_allclose(one["mean"], forecast.mean, rtol=1e-6)
            assert one["quantiles"] is None
        text = call(server, "GET", "/metrics").text
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0) + sample.value
        rows = totals["moeyard_moe_tokens_total"]
        assert rows >= 2 * 20 and totals["moeyard_expert_tokens_total"] == rows * 2 * 2
        assert totals["moeyard_expert_cache_misses_total"] > 0
        assert totals["moeyard_experts_resident"] <= totals["moeyard_expert_slots"] == 2
    finally:
        server.close()


def test_what_a_server_of_forecasts_cannot_have_is_refused_before_it_starts(folder):
    for options, message in (
        ({"kv_memory": "1GiB"}, "kv-memory is '1GiB', but .* keeps no keys"),
        ({"speculative": "ngram"}, "speculative is 'ngram', which servers of models of time"),
        ({"follow": "folder"}, "follow is 'folder'"),
        ({"expert_memory": "1B"}, "but one expert takes"),
        ({"expert_log": "folder"}, "expert-log is 'folder', but all experts are in memory"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_model(with_budgets(ServeArgs(model=str(folder), **options))[0])


@pytest.mark.server
@pytest.mark.slow
def test_ray_serves_forecasts_on_two_replicas(folder, columns, tmp_path):
    options = ["--expert-memory", "30%", "--replicas", "2", "--served-model-name", "waves"]
    with serving(folder, tmp_path, *options) as running:

        def ask(path, **body):
            headers = {"Content-Type": "application/json"}
            data = json.dumps(body).encode()
            request = urllib.request.Request(running.base + path, data, headers)
            return json.load(urllib.request.urlopen(request, timeout=60))

        series = list(columns.values())
        found = moeyard.load_forecaster(folder)(series, HORIZON)
        for _ in range(8):
            answer = ask("/v1/forecast", series=series, horizon=HORIZON)
            assert answer["model"] == "waves"
            for one, forecast in zip(answer["data"], found, strict=True):
                np.testing.assert_allclose(one["mean"], forecast.mean, rtol=1e-5)
        totals = running.totals()
        assert totals["moeyard_forecast_series_total"] == 16
        assert totals["moeyard_expert_tokens_total"] == 4 * totals["moeyard_moe_tokens_total"] > 0
        for path, body, status in (
            ("/v1/forecast", {"series": series, "horizon": 0}, 400),
            ("/v1/completions", {"model": "waves", "prompt": "a"}, 404),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(path, **body)
            assert caught.value.code == status
            assert "message" in json.load(caught.value)["error"]
        assert running.stop() == 0
