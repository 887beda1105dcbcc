"""Runs that publish: updates have the bytes of an export, and just what has changed."""

import shutil

import pytest
import torch
from safetensors import safe_open

from moeyard.cli import main
from moeyard.moe.updates.folder import UpdatesFolder
from moeyard.training import publisher
from moeyard.training.__main__ import main as train_here

from launch import torchrun

EVERY = ("checkpoint.every=1", "checkpoint.keep=9", "publish.every=1")


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def replayed(updates, last):
    """Return what a receiver has after versions 1 to ``last``."""
    found = {}
    for version in range(1, last + 1):
        found |= tensors_of(updates.of(version))
    return found


def exported(run, target, step):
    """Export a run as if ``step`` were its last one."""
    copy = target.with_name(f"{target.name}-run")
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    assert main(["export", str(copy), str(target)]) == 0
    return tensors_of(target)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "options",
    [
        ["train.precision=bf16", "model.tie_embeddings=true", "model.moe.d_shared=8"],
        pytest.param(
            ["model.dense_layers=[0]", "model.d_ff=40", "optimizer={kind: muon}"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bf16_shared_tied", "fp32_muon_dense_layer"],
)
def test_after_every_step_the_published_weights_are_an_export_bit_for_bit(
    tmp_path, config_file, options
):
    run, updates = tmp_path / "run", UpdatesFolder(tmp_path / "updates")
    args = [str(config_file), f"run_dir={run}", *EVERY, f"publish.folder={updates.path}"]
    assert train_here([*args, "train.steps=2", *options]) == 0
    assert updates.versions() == [1, 2]
    manifests = [updates.manifest(version) for version in (1, 2)]
    assert [(m.base, m.step) for m in manifests] == [(None, 1), (1, 2)]
    for step in (1, 2):
        expected = exported(run, tmp_path / f"model-{step}", step)
        assert_equal(replayed(updates, step), expected)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "options", [[], ["parallel.ep=2"], ["parallel.ep=2", "parallel.dense=fsdp"]], ids=str
)
def test_ranks_publish_together_what_they_export(tmp_path, config_file, options):
    run, updates = tmp_path / "run", UpdatesFolder(tmp_path / "updates")
    overrides = [f"run_dir={run}", *EVERY, f"publish.folder={updates.path}", "train.steps=2"]
    torchrun(2, "-m", "moeyard.training", str(config_file), *overrides, *options)
    assert updates.versions() == [1, 2]
    for step in (1, 2):
        expected = exported(run, tmp_path / f"model-{step}", step)
        assert_equal(replayed(updates, step), expected)
    assert not (run / publisher.STAGING).exists()


def publish(config_file, run, folder, *options):
    return train_here(
        [
            str(config_file),
            f"run_dir={run}",
            "publish.every=1",
            f"publish.folder={folder}",
            *options,
        ]
    )


def test_only_units_whose_bytes_changed_travel_and_frozen_ones_once(tmp_path, config_file):
    run, updates = tmp_path / "run", UpdatesFolder(tmp_path / "updates")
    assert publish(config_file, run, updates.path, "train.steps=2", "train.parameters=router") == 0
    full, delta = updates.manifest(1), updates.manifest(2)
    assert {key for key in full.units if not isinstance(key, str)} == {
        (layer, expert) for layer in range(2) for expert in range(4)
    }
    assert set(delta.units) == {"layers.0.mlp.gate.weight", "layers.1.mlp.gate.weight"}
    assert delta.num_bytes == sum(full.units[key].num_bytes for key in delta.units)


@pytest.mark.slow
def test_experts_alone_travel_where_that_is_asked(tmp_path, config_file):
    run, updates = tmp_path / "run", UpdatesFolder(tmp_path / "updates")
    assert publish(config_file, run, updates.path, "train.steps=2", "publish.what=experts") == 0
    for version in (1, 2):
        assert not [key for key in updates.manifest(version).units if isinstance(key, str)]


def test_full_snapshots_come_by_number_at_each_start_and_when_a_server_asks(tmp_path, config_file):
    run, updates = tmp_path / "run", UpdatesFolder(tmp_path / "updates")
    some = ("publish.full_every=3", "publish.keep=9", "checkpoint.every=2")
    assert publish(config_file, run, updates.path, "train.steps=4", *some) == 0
    (updates.path / ".version-00000009.tmp").mkdir()  # as a killed publisher leaves it
    assert publish(config_file, run, updates.path, "train.steps=6", *some) == 0
    bases = [updates.manifest(version).base for version in updates.versions()]
    assert bases == [None, 1, 2, None, None, 5]
    assert not list(updates.path.glob(".*"))
    assert updates.ask_for_full() and updates.wants_full()
    assert publish(config_file, run, updates.path, "train.steps=7", "publish.keep=1") == 0
    assert updates.versions() == [7] and not updates.wants_full()


def test_a_folder_with_updates_of_another_run_is_refused(tmp_path, config_file, capsys):
    folder = tmp_path / "updates"
    assert publish(config_file, tmp_path / "one", folder, "train.steps=1") == 0
    assert publish(config_file, tmp_path / "two", folder, "train.steps=1", "seed=4") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"error: publish.folder is '{folder}', which has updates of another run; choose another "
        "folder."
    )


def test_a_folder_that_takes_no_more_is_a_warning_and_the_next_update_is_full(
    tmp_path, config_file, monkeypatch, caplog
):
    updates, write = UpdatesFolder(tmp_path / "updates"), publisher.write_update

    def fails_once(target, head, units):
        if head.step == 2:
            raise OSError(28, "No space left on device")
        return write(target, head, units)

    monkeypatch.setattr(publisher, "write_update", fails_once)
    assert publish(config_file, tmp_path / "run", updates.path, "train.steps=4") == 0
    assert [updates.manifest(v).step for v in updates.versions()] == [1, 3, 4]
    assert [updates.manifest(v).base for v in updates.versions()] == [None, None, 2]
    assert f"step 2 is not published: {updates.path} could not be written (No space" in caplog.text
