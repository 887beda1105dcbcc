"""Runs of Moirai: what they measure, resume and export, and routers by clusters."""

import pytest
import torch
import yaml

from moeyard.cli import main as command
from moeyard.errors import ConfigError
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routers.kmeans import KMeans
from moeyard.moe.routes.reader import read_routes
from moeyard.parallel.mesh import Mesh
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.filling import fill_model
from moeyard.training.checkpoints.export import export, export_newest

from small_series import MOIRAI, values, write
from small_trainer import check_resumed, finished, metrics, trainer

LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moirai")
    source = write(folder / "series.csv", missing=[(40, "flow"), (41, "flow"), (90, "level")])
    written = values(source, folder / "unset", MOIRAI)
    written["data"]["split"] = [0.6, 0.2, 0.2]
    (folder / "run.yaml").write_text(yaml.safe_dump(written))
    return folder / "run.yaml"


def opened(folder, memory=None):
    """Return a folder's model, and the store of its experts."""
    options, here = StoreOptions(), torch.device("cpu")
    filled = fill_model(ModelFolder(folder), torch.float32, memory, options, here)
    return filled.model.eval(), filled.store


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return finished(config, tmp_path_factory.mktemp("whole"), "monitor.routes={}")


@pytest.fixture(scope="module")
def dense(config, tmp_path_factory):
    return finished(config, tmp_path_factory.mktemp("dense"), "model.moe=null").folder


def test_a_run_measures_its_loss_its_forecasts_and_the_load_of_experts(whole):
    run, run_dir = whole
    last = metrics(run_dir)[-1]
    windows = run._data.held_out.rows(range(len(run._data.held_out)))
    with torch.no_grad():
        scored = run.decoder.eval().score(windows.values_BL, windows.observed_BL)
        ahead = run.decoder.predict(windows.values_BL[:, :-6], windows.observed_BL[:, :-6], 6)
    errors = (ahead.mean_BH - windows.values_BL[:, -6:])[windows.observed_BL[:, -6:]]
    assert last["eval_loss"] == pytest.approx(float(scored.loss_sum) / scored.num_targets, rel=1e-4)
    assert last["eval_mse"] == pytest.approx(float(errors.square().mean()), rel=1e-3)
    rows = run.objective.num_tokens(range(5, 6))
    assert rows == 8 * 4 and last["tokens"] == 6 * rows  # 5 patches, of which 4 are read
    assert [sum(counts) for counts in last["expert_tokens"]] == [2 * rows] * 2
    assert len(read_routes(run_dir / "routes").tokens_N) == 6 * rows


def test_an_evaluation_without_a_target_has_forecasts_and_no_loss(config, tmp_path):
    head, *lines = write(tmp_path / "flat.csv").read_text().splitlines()
    for line in range(52, 68):  # what the scaler of the first held-out window reads
        lines[line] = f"{lines[line].split(',')[0]},5,5"
    (tmp_path / "flat.csv").write_text("\n".join([head, *lines]) + "\n")
    options = [f"data.source={tmp_path}/flat.csv", "train.eval_sequences=1"]
    run = trainer(config, tmp_path / "run", *options)
    found = run.objective.evaluate(run._loss, Mesh())
    assert found.num_tokens == 0 and found.metrics.keys() == {"eval_mse", "eval_mae"}


@pytest.mark.slow
def test_a_run_learns_waves(config, tmp_path):
    longer = ["train.steps=400", "train.log_every=100", "optimizer.lr=3e-3"]
    trainer(config, tmp_path / "run", *longer).run()
    assert metrics(tmp_path / "run")[-1]["eval_mse"] < 0.4  # a constant has 1


def test_a_resumed_run_ends_as_one_that_was_not_stopped(config, whole, tmp_path):
    check_resumed(config, whole, tmp_path, "monitor.routes={}")


def test_exports_forecast_the_same_also_offloaded(whole, tmp_path):
    run, run_dir = whole
    export(run_dir, tmp_path / "model")
    folder = ModelFolder(tmp_path / "model")
    assert folder.values["model_type"] == "moeyard" and folder.check() is None
    assert folder.config == run.decoder.config
    scales = (tmp_path / "model" / "series.json").read_text()
    assert convert(tmp_path / "model", tmp_path / "bf16", dtype="bf16") == "moeyard"
    assert (tmp_path / "bf16" / "series.json").read_text() == scales
    windows = run._data.held_out.rows(range(5))
    forecasts = [run.decoder.eval().predict(*windows[:2], 9, LEVELS)]
    for memory in (None, "30%"):
        model, store = opened(tmp_path / "model", memory)
        assert (store is None) == (memory is None)
        forecasts.append(model.predict(*windows[:2], 9, LEVELS))
    assert torch.equal(forecasts[1].quantiles_BHQ, forecasts[2].quantiles_BHQ)
    assert torch.equal(forecasts[1].mean_BH, forecasts[2].mean_BH)
    torch.testing.assert_close(forecasts[0].mean_BH, forecasts[1].mean_BH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [["cluster", "--experts=3"], ["upcycle", "--num-experts=3"]], ids=lambda o: o[0]
)
def test_a_dense_model_gets_experts_and_begins_as_it_was(dense, tmp_path, options):
    source = dense if options[0] == "cluster" else export_newest(dense)
    assert command([options[0], str(source), str(tmp_path / "moe"), *options[1:], "--k=2"]) == 0
    (before, _), (after, _) = (opened(f) for f in (export_newest(dense), tmp_path / "moe"))
    assert isinstance(after.config.moe.router, KMeans) == (options[0] == "cluster")
    values_BL = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)
    observed_BL = torch.ones_like(values_BL, dtype=torch.bool)
    found, wanted = (m.predict(values_BL, observed_BL, 6).mean_BH for m in (after, before))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_clustered_model_trains_on(config, dense, tmp_path):
    assert command(["cluster", str(dense), str(tmp_path / "moe"), "--experts=4"]) == 0
    run = trainer(config, tmp_path / "run", f"start_from={tmp_path / 'moe'}", "model={}")
    centroids_ED = run.decoder.routers()[1].centroids_ED.clone()
    run.run()
    assert torch.equal(run.decoder.routers()[1].centroids_ED, centroids_ED)
    first, second = run.decoder.layers[1].mlp.experts.fc2[:2]
    assert not torch.equal(first, second)  # copies went apart


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.horizon=20", "data.context=50"], "data.horizon is 20 after a context of 50 points"),
        (["train.sequence_length=4"], "train.sequence_length is 4, but windows of so few points"),
        (
            ["train.sequence_length=12", "model.scaler_share=0.9"],
            "train.sequence_length is 12, but",
        ),
        (
            ["data.horizon=2", "data.context=2"],
            "data.horizon is 2 after a context of 2 points, but",
        ),
        (["parallel.pp=2"], "model.kind is moirai, which is not split into stages"),
        (["train.sequence_length=65"], "train.sequence_length is 65, but model.max_positions"),
        (["model.moe.router={kind: hash, k: 2}"], "which reads the token id of each row, and rows"),
    ],
)
def test_runs_that_cannot_work_are_refused(config, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        trainer(config, tmp_path / "run", *overrides)
