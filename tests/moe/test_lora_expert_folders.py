"""Folders of LoRA experts that are damaged or of another model: one sentence each."""

import json

import pytest
import torch
from lora_expert_folders import DENSE, write_random

from moeyard.errors import ModelFileError
from moeyard.moe.folders.adapters import adapter_table
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.models.decoder import Decoder

from small_model import CONFIG

MLP = "model.layers.1.mlp."


@pytest.fixture(scope="module")
def table():
    return adapter_table(Decoder(DENSE), FAMILIES["qwen3"])


def refused(table, folder, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        table.load("mole", folder)
    assert str(caught.value).startswith("adapter 'mole': ") and "\n" not in str(caught.value)
    assert table.names == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{MLP}router.weight": None}, r"layers.1.mlp.router.weight is missing"),
        ({f"{MLP}router.bias": None}, r"layers.1.mlp.router.bias is missing"),
        ({f"{MLP}up_proj.lora_B": None}, r"up_proj.lora_B is missing"),
        ({f"{MLP}router.bias": torch.zeros(4)}, r"has shape \[4\], but .* ask for \[3\]"),
        ({f"{MLP}down_proj.lora_A": torch.zeros(3, 3, 24)}, r"ask for \[3, 3, 20\]"),
        ({f"{MLP}gate_proj.lora_C": torch.zeros(3)}, r"gate_proj.lora_C is no part"),
        ({"model.embed_tokens.lora_A": torch.zeros(3, 3)}, "is no part of LoRA experts"),
        ({"model.layers.3.mlp.router.bias": torch.zeros(3)}, "but the model has 3 layers"),
        ({"model.layers.0.self_attn.x.lora_A": torch.zeros(3, 24)}, "another model"),
        ({"model.layers.0.self_attn.q_proj.lora_B": None}, r"q_proj.lora_B is missing"),
        ({f"{MLP}router.bias": torch.tensor([0.0, float("nan"), 0])}, "not finite"),
        ({f"{MLP}router.bias": torch.zeros(3, dtype=torch.int32)}, "not of floating-point"),
    ],
)
def test_tensors_that_do_not_fit(table, tmp_path, changes, message):
    refused(table, write_random(tmp_path / "a", **changes), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, r"A .*ask for \[4, 24\]"),
        ({"experts": 4}, r"router.weight has shape \[3, 24\], but .* ask for \[4, 24\]"),
        ({"experts": 1}, "experts = '1'"),
        ({"weighting": "all"}, "weighting = 'all'"),
        ({"version": 2}, "version = '2'"),
        ({"alpha": "6"}, "alpha = '6'"),
        ({"r": 3}, "r = '3'"),
        ({"peft_type": "LORA_EXPERTS"}, "peft_type = 'LORA_EXPERTS', which is not offered"),
        ({"peft_type": "LORA"}, "r = None and lora_alpha = None"),
    ],
)
def test_configurations_that_do_not_fit(table, tmp_path, changes, message):
    folder = write_random(tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(table, folder, message)


def test_models_of_another_shape_and_folders_without_tensors(table, tmp_path):
    folder = write_random(tmp_path / "a")
    with_experts = adapter_table(Decoder(CONFIG), FAMILIES["moeyard"])
    refused(with_experts, folder, "for layer 0, which is a MoE layer here")
    wide = DENSE.model_copy(update={"d_ff": 28})
    refused(adapter_table(Decoder(wide), FAMILIES["qwen3"]), folder, "of another model or rank")
    (folder / "lora_experts.safetensors").write_bytes(b"\0" * 20)
    refused(table, folder, "lora_experts.safetensors")
    (folder / "lora_experts.safetensors").unlink()
    refused(table, folder, "has no lora_experts.safetensors; export the adapter again")
    (folder / "adapter_config.json").write_text("[")
    refused(table, folder, "is not JSON")


def test_a_layer_may_have_none(table, tmp_path):
    without = dict.fromkeys(f"{MLP}router.{name}" for name in ("weight", "bias"))
    for projection in ("gate_proj", "up_proj", "down_proj"):
        without |= dict.fromkeys(f"{MLP}{projection}.lora_{matrix}" for matrix in "AB")
    table.load("mole", write_random(tmp_path / "a", **without))
    assert len(table.get("mole").mlps) == 2
    table.unload("mole")
