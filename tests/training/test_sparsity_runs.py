"""Runs with the sparsity-aware router: where its statistics come from, and what it is not for."""

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.experts.gate_statistics import gate_statistics
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.parallel.mesh import Mesh
from moeyard.training.checkpoints.export import export
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

from small_model import CONFIG, write_decoder

SPARSITY = ["model.moe.activation=reglu", "model.moe.router={kind: sparsity}"]


@pytest.fixture(scope="module")
def topk_folder(tmp_path_factory):
    """A model with ReLU gates and a top-k router."""
    moe = MoEConfig(num_experts=4, d_expert=20, activation="reglu", router=moeyard.TopK(k=2))
    decoder = Decoder(CONFIG.model_copy(update={"moe": moe}))
    initialize(decoder, 5)
    path = tmp_path_factory.mktemp("topk") / "m"
    write_decoder(path, decoder, eos_id=256)
    return path


def assert_known(decoder) -> None:
    """Check that routers remember the statistics of the weights as they are."""
    for _, layer in decoder.moe_layers():
        fc1_EHD, width = layer.experts.fc1, layer.d_expert
        mean_ED, variance_ED = gate_statistics(fc1_EHD, None, None, width).unbind(1)
        assert layer.gate.mean_ED.dtype == torch.float32
        torch.testing.assert_close(layer.gate.mean_ED, mean_ED, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.gate.variance_ED, variance_ED, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_from_another_routers_folder_knows_its_experts_before_and_after_steps(
    topk_folder, config_file, tmp_path, precision
):
    options = [f"run_dir={tmp_path}/run", f"start_from={topk_folder}", "train.steps=3"]
    options += ["model={moe: {router: {kind: sparsity}}}", f"train.precision={precision}"]
    config = read_run_config(config_file, options)
    trainer = Trainer(config, tmp_path / "run", Mesh())
    first = [gate.mean_ED.clone() for gate in trainer.decoder.routers()]
    assert_known(trainer.decoder)
    trainer.run()
    assert_known(trainer.decoder)
    for gate, before in zip(trainer.decoder.routers(), first, strict=True):
        assert not torch.equal(gate.mean_ED, before)
    export(tmp_path / "run", tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    stored = {name: t for name, t in weights.items() if name.endswith(("mean_ED", "variance_ED"))}
    assert len(stored) == 4 and all(t.dtype == torch.float32 for t in stored.values())
    decoder = trainer.decoder.eval()
    ids_BT = torch.randint(0, 250, (1, 14), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = decoder.logits(decoder(batch_of_rows(ids_BT)).hidden_TD)
    if precision == "fp32":
        logits = moeyard.load(tmp_path / "out")(ids_BT)
        torch.testing.assert_close(logits[0], expected, rtol=1e-5, atol=1e-5)


def test_updates_of_attention_leave_the_statistics_and_the_router_alone(config_file, tmp_path):
    lora = ["train.parameters=lora", "lora.targets=[attention]", "train.steps=2"]
    config = read_run_config(config_file, [f"run_dir={tmp_path}/run", *SPARSITY, *lora])
    trainer = Trainer(config, tmp_path / "run", Mesh())
    first = [gate.mean_ED.clone() for gate in trainer.decoder.routers()]
    trainer.run()
    for gate, before in zip(trainer.decoder.routers(), first, strict=True):
        assert torch.equal(gate.mean_ED, before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["train.parameters=router"], "sparsity routers, which learn nothing; use all or lora"),
        (
            ["train.parameters=lora"],
            r"lora.targets has experts, but sparsity routers read .* use \[attention\]",
        ),
        (["model.moe.activation=geglu"], "activation is geglu, .* set activation to relu or reglu"),
    ],
)
def test_what_it_is_not_for_gets_one_sentence(config_file, tmp_path, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_run_config(config_file, [f"run_dir={tmp_path}/run", *SPARSITY, *options])
