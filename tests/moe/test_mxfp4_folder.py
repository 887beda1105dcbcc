"""A gpt-oss folder with its experts in MXFP4, as it is published: opened, converted, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

import moeyard
from moeyard.cli import main
from moeyard.moe.folders.convert import convert

from hf_families import save

SIZES = {"hidden_size": 64, "intermediate_size": 96}
TRANSPOSED = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder that transformers saved, its expert matrices replaced by blocks and scales."""
    folder = tmp_path_factory.mktemp("mxfp4")
    save("gpt_oss", folder, **SIZES)
    tensors, g = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(TRANSPOSED)]:
        experts, inputs, outputs = tensors.pop(name).shape
        size = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=g)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(122, 126, size, dtype=torch.uint8, generator=g)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def theirs(folder):
    widened = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=widened)
    return model.float().eval()


def some_ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 41), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_packed_folder_gives_the_logits_of_transformers(packed):
    expected = theirs(packed)(some_ids()).logits
    assert expected.abs().max() > 1
    found = moeyard.load(packed, dtype="float32")(some_ids())
    assert (found - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_offloaded_experts_of_a_packed_folder_give_the_same_bits(packed):
    resident = moeyard.load(packed, dtype="float32")
    offloaded = moeyard.load(packed, dtype="float32", expert_memory="30%")
    assert torch.equal(offloaded(some_ids()), resident(some_ids()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_is_converted_to_plain_numbers_opens_in_transformers_alike(packed, tmp_path, dtype):
    convert(packed, tmp_path / "plain", dtype=dtype)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").float().eval()
    kept = theirs(packed)
    for (name, found), (_, expected) in zip(
        model.named_parameters(), kept.named_parameters(), strict=True
    ):
        if name.endswith(TRANSPOSED):  # bf16 holds these exactly
            assert torch.equal(found, expected), name


def test_blocks_without_scales_are_refused_in_one_line(packed, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((packed / "config.json").read_text())
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, broken / "model.safetensors")
    assert main(["convert", str(broken), str(tmp_path / "out"), "--dtype", "bf16"]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.layers.1.mlp.experts.down_proj_scales" in shown
    assert not (tmp_path / "out").exists()
