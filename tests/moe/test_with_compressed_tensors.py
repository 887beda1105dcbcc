"""Against the compressed-tensors package, and transformers with it, where it is installed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeyard.kernels.values.quantize import quantize
from moeyard.kernels.values.quantized_weights import empty_matrices
from moeyard.moe.folders.compressed_tensors import PackedFormat, read_matrix, slot_view, to_stored
from moeyard.moe.folders.quantized_config import quantization_config
from moeyard.moe.folders.writer import TensorPlan, write_model_folder

from hf_families import assert_same_model

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match

EACH_FORMAT = pytest.mark.parametrize(
    ("bits", "group_size"), [(8, None), (8, 32), (4, 32), (4, 64)]
)
COMPRESSOR = BaseCompressor.get_value_from_registry("pack-quantized")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def their_config(bits, group_size):
    """Let the package read what we write."""
    config = quantization_config(PackedFormat(bits, group_size), ["lm_head.weight"])
    parsed = QuantizationConfig.model_validate(config)
    return parsed, parsed.config_groups["group_0"]


@EACH_FORMAT
def test_the_package_decompresses_to_our_bits(bits, group_size):
    _, scheme = their_config(bits, group_size)
    matrices = quantize(random(1, 12, 128), bits, group_size)
    stored = to_stored("weight", slot_view(matrices, 0))
    theirs = COMPRESSOR.decompress(stored, scheme)["weight"]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs, matrices.dequantize(0, torch.bfloat16))


@EACH_FORMAT
def test_what_the_package_compresses_is_read_to_its_own_bits(bits, group_size):
    """Values over the whole range, -128 and -8 among them."""
    _, scheme = their_config(bits, group_size)
    scales = (random(12, 128 // (group_size or 128)).abs() + 0.1).bfloat16()
    weight = (random(12, 128, seed=1) * 2.0 ** (bits - 2)).bfloat16()
    state = {"weight": weight, "weight_scale": scales}
    stored = COMPRESSOR.compress(state, scheme)
    expected = COMPRESSOR.decompress(stored, scheme)["weight"]
    found = empty_matrices(1, 12, 128, bits, group_size or 128, torch.device("cpu"))
    read_matrix(lambda name, out: out.copy_(stored[name]), "weight", slot_view(found, 0))
    assert (found.values if bits == 8 else found.values & 15).min() == (-128 if bits == 8 else 0)
    assert torch.equal(found.dequantize(0, torch.bfloat16), expected)


def test_the_package_quantizes_routed_experts_and_nothing_else():
    config, scheme = their_config(4, 64)
    linear = torch.nn.Linear(1, 1)
    prefix = "model.layers.10.mlp"
    quantized = (f"{prefix}.experts.31.up_proj", "model.layers.0.block_sparse_moe.experts.0.w1")
    others = ("lm_head", "model.layers.0.self_attn.q_proj", f"{prefix}.gate")
    others += (f"{prefix}.shared_expert.up_proj", f"{prefix}.shared_experts.up_proj")
    others += (f"{prefix}.experts", f"{prefix}.experts.act_fn", f"{prefix}.up_proj")
    for name in quantized:
        assert is_match(name, linear, scheme.targets, config.ignore)
    for name in others:
        assert not is_match(name, linear, scheme.targets, config.ignore)


@torch.no_grad()
def test_transformers_opens_a_folder_with_packed_experts(tmp_path):
    """The logits are those of a model with the dequantized experts."""
    config = Qwen3MoeConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain/model.safetensors")
    packed, stored, plain_names = PackedFormat(4, 32), {}, []
    for name, tensor in plain.items():
        if ".experts." in name:
            matrices = quantize(tensor[None], packed.bits, packed.group_size)
            stored |= to_stored(name, slot_view(matrices, 0))
            plain[name] = matrices.dequantize(0, torch.bfloat16)
        else:
            stored[name] = tensor
            plain_names += [name] * (tensor.ndim == 2)
    save_file(plain, tmp_path / "plain/model.safetensors", {"format": "pt"})
    values = json.loads((tmp_path / "plain/config.json").read_text())
    values["quantization_config"] = quantization_config(packed, plain_names)
    plans = [
        TensorPlan(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: [tensor])
        for name, tensor in stored.items()
    ]
    write_model_folder(tmp_path / "packed", values, plans, lambda _folder: None, {})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(theirs, expected, torch.arange(30)[None])
