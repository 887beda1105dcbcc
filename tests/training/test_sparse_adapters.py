"""Late adapters on 2:4 experts (after SLoPe): frozen weights keep their zeros, merged ones not."""

import pytest
import torch

import moeyard
from moeyard.cli import main as command
from moeyard.errors import CheckpointError
from moeyard.kernels.values.n_of_m import keep_mask, masked
from moeyard.kernels.values.two_of_four import PATTERN
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.convert import convert
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.topk import TopK
from moeyard.parallel.mesh import Mesh
from moeyard.serving.frozen_experts import open_frozen
from moeyard.training.checkpoints.export import export
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

import small_model

CONFIG = small_model.CONFIG.model_copy(
    update={"d_model": 32, "moe": MoEConfig(num_experts=6, d_expert=24, router=TopK(k=2))}
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with 2:4 experts in bf16, plain and packed."""
    folder = tmp_path_factory.mktemp("sparse")
    model = Decoder(CONFIG)
    initialize(model, 5)
    for name, parameter in model.named_parameters():
        if name.endswith(("fc1", "fc2")):
            parameter.data = masked(parameter.data, keep_mask(parameter.data, PATTERN))
    small_model.write_decoder(folder / "fp32", model, eos_id=256)
    convert(folder / "fp32", folder / "plain", "bf16")
    convert(folder / "plain", folder / "packed", "2:4")
    return folder


def trained(config_file, folder, run, *more):
    """Train low-rank updates of all targets; return the trainer, its source closed."""
    options = [f"run_dir={run}", f"start_from={folder}", "model=null", "data.tokenizer=null"]
    options += ["train.parameters=lora", "lora={rank: 2, alpha: 3}", "optimizer.lr=0.05"]
    run.mkdir()
    config = read_run_config(config_file, [*options, "train.steps=3", *more])
    trainer = Trainer(config, run, Mesh(), open_source=open_frozen)
    trainer.run()
    return trainer


def updates_of(trainer):
    return {n: p.detach() for n, p in trainer.decoder.named_parameters() if p.requires_grad}


def test_updates_train_on_packed_experts_as_on_plain_ones(folders, config_file, tmp_path):
    plain = trained(config_file, folders / "plain", tmp_path / "plain")
    packed = trained(config_file, folders / "packed", tmp_path / "packed")
    streamed = trained(
        config_file, folders / "packed", tmp_path / "streamed", "train.expert_memory=25%"
    )
    expected = updates_of(plain)
    assert any(".fc1_lora_a" in name for name in expected)
    for found in (updates_of(packed), updates_of(streamed)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    for (_, ours), (_, theirs) in zip(
        packed.decoder.moe_layers(), plain.decoder.moe_layers(), strict=True
    ):
        assert torch.equal(ours.experts.fc1, theirs.experts.fc1)
        assert torch.equal(ours.experts.fc1 != 0, keep_mask(ours.experts.fc1, PATTERN))


def test_an_adapter_is_served_unmerged_and_not_merged(folders, config_file, tmp_path):
    trained(config_file, folders / "packed", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"merged they would not be 2:4; export with --ad"):
        export(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert command(["export", str(tmp_path / "run"), str(tmp_path / "tuned"), "--adapter"]) == 0
    ids_BT = torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(0))
    adapters = {"tuned": tmp_path / "tuned"}
    plain = moeyard.load(folders / "plain", adapters=adapters)
    expected = plain(ids_BT, adapter="tuned")
    assert not torch.equal(expected, plain(ids_BT))
    for memory in (None, "50%"):
        model = moeyard.load(folders / "packed", adapters=adapters, expert_memory=memory)
        assert torch.equal(model(ids_BT, adapter="tuned"), expected)


@pytest.mark.slow
def test_updates_of_attention_alone_can_be_merged(folders, config_file, tmp_path):
    only = "lora={rank: 2, targets: [attention]}"
    trained(config_file, folders / "packed", tmp_path / "run", only)
    export(tmp_path / "run", tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "again", "2:4")
