"""Exported folders: transformers opens them, and every mesh writes the same files."""

import gc
import resource
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

import moeyard
from moeyard.cli import main
from moeyard.errors import CheckpointError, ModelFileError
from moeyard.training.__main__ import main as train_here
from moeyard.training.checkpoints.checkpoint import StoredTensors

from launch import torchrun


def export(run_dir, target) -> None:
    assert main(["export", str(run_dir), str(target)]) == 0
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1  # all who may read one


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config_file):
    """The same weights saved by 2 ranks with EP=2, by 2 ranks with EP=1, and by one process."""
    import shutil

    folder = tmp_path_factory.mktemp("runs")
    options = ["train.steps=20", "optimizer.lr=0.02", "checkpoint.every=10"]
    torchrun(
        2,
        "-m",
        "moeyard.training",
        str(config_file),
        f"run_dir={folder}/ep2",
        *options,
        "parallel.ep=2",
    )
    for name in ("ep1", "one"):
        shutil.copytree(folder / "ep2", folder / name)
    # One more step of rate zero makes the other meshes write separate checkpoints.
    still = ["train.steps=21", "optimizer.lr=1e-30", "checkpoint.every=10"]
    for name, ep in (("ep2", 2), ("ep1", 1)):
        run = ["-m", "moeyard.training", str(config_file), f"run_dir={folder}/{name}", *still]
        torchrun(2, *run, f"parallel.ep={ep}")
    assert train_here([str(config_file), f"run_dir={folder}/one", *still]) == 0
    for name in ("ep2", "ep1", "one"):
        export(folder / name, folder / f"{name}-model")
    return folder


@pytest.mark.dist
def test_every_mesh_exports_the_same_files(runs):
    files = sorted(p.name for p in (runs / "ep2-model").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    for name in ("ep1", "one"):
        assert sorted(p.name for p in (runs / f"{name}-model").iterdir()) == files
        for file in files:
            here, there = (runs / f"{n}-model" / file for n in ("ep2", name))
            assert here.read_bytes() == there.read_bytes(), f"{file} differs in {name}"


@pytest.mark.dist
@torch.no_grad()
def test_transformers_opens_the_export_with_equal_logits_and_tokens(runs):
    theirs, info = AutoModelForCausalLM.from_pretrained(
        runs / "ep2-model", output_loading_info=True
    )
    assert isinstance(theirs, Qwen3MoeForCausalLM) and theirs.dtype == torch.float32
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = moeyard.load(runs / "ep2-model")
    tokenizer = AutoTokenizer.from_pretrained(runs / "ep2-model")
    ids = torch.tensor([tokenizer("def function_7(a, b=3):\n    return")["input_ids"]])
    difference = (ours(ids) - theirs(ids).logits).abs().max()
    print(f"\nlargest difference of logits {float(difference):.1e}")
    assert difference <= 1e-4
    expected = theirs.generate(ids, max_new_tokens=64, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=64, temperature=0), expected)
    print(f"64 greedy tokens equal: {tokenizer.decode(expected[0, -64:].tolist())!r}")


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["model.moe.router={kind: hash, k: 1}", "train.precision=bf16"], "moeyard"),
        (["model.moe.d_shared=8", "model.tie_embeddings=true"], "moeyard"),
        (["model.moe=null", "model.d_ff=40"], "qwen3"),
        (["model.dense_layers=[0]", "model.d_ff=40", "train.precision=bf16"], "qwen3_moe"),
    ],
    ids=["hash_bf16", "shared_tied", "dense", "mixed_bf16"],
)
def test_every_kind_of_model_comes_back_with_its_own_loss(tmp_path, config_file, overrides, kind):
    import json

    from moeyard.parallel.mesh import Mesh
    from moeyard.training.__main__ import main as train
    from moeyard.training.read_config import read_run_config
    from moeyard.training.trainer import Trainer

    options = [f"run_dir={tmp_path}/run", *overrides]
    assert train([str(config_file), *options]) == 0
    export(tmp_path / "run", tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == kind
    config = read_run_config(config_file, options)
    trainer = Trainer(config, tmp_path / "run", Mesh())
    trainer.saves.resume()
    ids = torch.randint(0, 256, (2, 30))
    from moeyard.moe.batch import batch_of_rows

    trainer.decoder.eval()
    with torch.no_grad():
        trained = trainer.decoder.logits(trainer.decoder(batch_of_rows(ids)).hidden_TD)
    loaded = moeyard.load(tmp_path / "model")(ids).flatten(0, 1)
    assert torch.equal(loaded, trained)


def test_export_refuses_what_is_there_and_what_is_missing(tmp_path, config_file, capsys):
    from moeyard.training.__main__ import main as train

    (tmp_path / "empty").mkdir()
    assert main(["export", str(tmp_path / "empty"), str(tmp_path / "out")]) == 1
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert train([str(config_file), f"run_dir={tmp_path}/run"]) == 0
    capsys.readouterr()
    with pytest.raises(ModelFileError, match=r"run is a run, which has no config\.json; export it"):
        moeyard.load(tmp_path / "run")
    (tmp_path / "out").mkdir()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_another_tokenizer_than_the_trained_one_is_not_exported(
    tmp_path, config_file, capsys, monkeypatch
):
    from moeyard.training.__main__ import main as train
    from moeyard.training.data.tokenizer import ByteTokenizer

    assert train([str(config_file), f"run_dir={tmp_path}/run"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(ByteTokenizer, "sha256", "0" * 64)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "is not the one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_no_folder(tmp_path, config_file, capsys):
    from moeyard.training.__main__ import main as train

    assert train([str(config_file), f"run_dir={tmp_path}/run"]) == 0
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written (File too large)" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_an_export_reads_a_tensor_when_its_turn_has_come(tmp_path, config_file, monkeypatch):
    """Never the whole model: at most the one tensor that is kept for its other half."""
    from moeyard.training.__main__ import main as train

    assert train([str(config_file), f"run_dir={tmp_path}/run"]) == 0
    plain, alive, reads = StoredTensors.__getitem__, [], []

    def watched(self, key):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
        tensor = plain(self, key)
        alive.append(weakref.ref(tensor))
        reads.append(key)
        return tensor

    monkeypatch.setattr(StoredTensors, "__getitem__", watched)
    gc.freeze()  # a collection then looks at what is new, not at all that earlier tests left
    try:
        export(tmp_path / "run", tmp_path / "out")
    finally:
        gc.unfreeze()
    assert len(reads) == len(set(reads)) > 20
    stored = StoredTensors(tmp_path / "run/checkpoints/step-00000006")
    assert set(reads) == {key for key in stored if key.startswith(("weight/", "buffer/"))}


def test_a_checkpoint_that_cannot_be_read_gets_one_sentence(tmp_path, config_file):
    from moeyard.training.__main__ import main as train

    assert train([str(config_file), f"run_dir={tmp_path}/run"]) == 0
    folder = tmp_path / "run/checkpoints/step-00000006"
    stored = StoredTensors(folder)
    for shard in folder.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"norm\.weight of .* could not be read"):
        stored["weight/norm.weight"]
