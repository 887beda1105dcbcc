"""Routers by clusters: the new model begins as the old one; centroids are means of its rows."""

import pytest
import torch

import moeyard
from moeyard.cli import main as command
from moeyard.errors import ConfigError
from moeyard.moe.routers.kmeans import KMeans
from moeyard.moe.routers.kmeans_fit import fit_centroids
from moeyard.parallel.mesh import Mesh
from moeyard.training.checkpoints.export import export_newest
from moeyard.training.cluster import ClusterSettings, cluster, explained_share
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

IDS = torch.randint(0, 256, (2, 31), generator=torch.Generator().manual_seed(0))


def train(config_file, run_dir, *overrides):
    run_dir.mkdir(exist_ok=True)
    config = read_run_config(config_file, [f"run_dir={run_dir}", *overrides])
    (run_dir / "config.yaml").write_text(config_yaml(config))
    run = Trainer(config, run_dir, Mesh())
    run.run()
    return run


def config_yaml(config):
    from moeyard.training.run.folder import dump_config

    return dump_config(config)


@pytest.fixture(scope="module")
def dense(config_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("dense") / "run"
    train(config_file, run_dir, "model.moe=null", "model.d_ff=24", "model.dense_layers=[]")
    return run_dir


@pytest.fixture(scope="module")
def sparse(config_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sparse") / "run"
    train(config_file, run_dir, "model.dense_layers=[0]", "model.d_ff=24")
    return run_dir


@torch.no_grad()
@pytest.mark.parametrize("choose", ["nearest", "farthest"])
def test_a_dense_model_with_clusters_begins_as_it_was(dense, tmp_path, choose, capsys):
    options = ["--experts=5", "--k=3", f"--choose={choose}", "--rows=700"]
    assert command(["cluster", str(dense), str(tmp_path / "moe"), *options]) == 0
    out = capsys.readouterr().out
    assert "model_type=moeyard rows=700 explained=0." in out
    before, after = moeyard.load(export_newest(dense)), moeyard.load(tmp_path / "moe")
    router = after.config.moe.router
    assert isinstance(router, KMeans) and (router.choose, router.k) == (choose, 3)
    assert after.config.moe_layers == [0, 1] and after.config.moe.num_experts == 5
    torch.testing.assert_close(after(IDS), before(IDS), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_centroids_are_the_clusters_of_what_the_mlps_read(dense, tmp_path):
    cluster(dense, tmp_path / "moe", ClusterSettings(experts=4, k=1, rows=300, seed=2))
    model = moeyard.load(export_newest(dense))
    decoder, rows = model.decoder, [[], []]
    for layer, parts in zip(decoder.layers, rows, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, given, parts=parts: parts.append(given[0]))
    config = read_run_config(dense / "config.yaml")
    run = Trainer(config, dense, Mesh())
    for step in (0, 1):
        run.objective.module(decoder)(run.objective.batch(step, range(8), torch.device("cpu")))
    written = moeyard.load(tmp_path / "moe").decoder
    for parts, router in zip(rows, written.routers(), strict=True):
        wanted_ED = fit_centroids(torch.cat(parts)[:300], 4, seed=2)
        torch.testing.assert_close(router.centroids_ED, wanted_ED.float())
    assert explained_share(torch.cat(rows[0])[:300], wanted_ED) < explained_share(
        torch.cat(rows[1])[:300], wanted_ED
    )


@torch.no_grad()
def test_experts_that_a_model_has_stay(sparse, tmp_path):
    cluster(sparse, tmp_path / "moe", ClusterSettings(rows=100))
    before, after = (moeyard.load(f).decoder for f in (export_newest(sparse), tmp_path / "moe"))
    new = after.state_dict()
    for name, tensor in before.state_dict().items():
        if ".gate." not in name:
            assert torch.equal(new[name], tensor), name
    assert new["layers.1.mlp.gate.centroids_ED"].shape == (4, 32)
    assert [index for index, _ in after.moe_layers()] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the model is dense; give the number of experts"),
        ({"experts": 0}, "experts is 0; use 1 to"),
        ({"experts": 2, "k": 3}, "router.k is 3, but the layer has 2 experts"),
        ({"experts": 9, "rows": 8}, "the data have 8 rows for 9 clusters; give more data"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(dense, tmp_path, options, message):
    with pytest.raises(moeyard.errors.MoeyardError, match=message):
        cluster(dense, tmp_path / "moe", ClusterSettings(**options))
    assert not (tmp_path / "moe").exists()


def test_other_numbers_of_experts_and_folders_without_a_run_are_refused(sparse, tmp_path):
    with pytest.raises(ConfigError, match="experts is 5, but the model has 4 in a layer already"):
        cluster(sparse, tmp_path / "moe", ClusterSettings(experts=5))
    with pytest.raises(ConfigError, match="which is no run; give a trained run"):
        cluster(tmp_path, tmp_path / "moe", ClusterSettings(experts=5))
