"""Folders converted to other types open, run, and lose no more than rounding takes."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError, ModelFileError
from moeyard.kernels.values.quantized_weights import QuantizedExpertWeights
from moeyard.moe.experts.quantized import QuantizedExperts
from moeyard.moe.folders.convert import convert

from hf_families import save

# Widths that groups of 32 divide; heads that do not fit by chance.
WIDE = {"hidden_size": 64, "head_dim": 12}
EXPERTS = {
    "mixtral": {"intermediate_size": 96},
    "qwen2_moe": {"moe_intermediate_size": 96},
    "deepseek_v3": {"moe_intermediate_size": 96},
    "gpt_oss": {"intermediate_size": 96},
}
DTYPES = ("int8", "int4")


def some_ids(rows: int = 2, length: int = 33) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=EXPERTS)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder, **WIDE, **EXPERTS[request.param])
    return folder


def widened(model: moeyard.load) -> None:
    """Replace quantized experts by their dequantized weights."""
    from moeyard.kernels.values.expert_weights import ExpertWeights

    for _, layer in model.decoder.moe_layers():
        weights = layer.experts.weights
        assert isinstance(weights, QuantizedExpertWeights)
        slots = [weights.matrices(slot, torch.float32) for slot in range(weights.num_slots)]
        fc1, fc2 = (torch.stack(part) for part in zip(*slots, strict=True))
        biases = (weights.fc1_bias_SH, weights.fc2_bias_SD)
        plain = ExpertWeights.of((fc1, fc2, *biases), activation=weights.activation)
        layer.experts.weights = plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_in_few_bits_run_as_the_weights_they_stand_for(source, tmp_path, dtype):
    convert(source, tmp_path / "few", dtype)
    model = moeyard.load(tmp_path / "few")
    for _, layer in model.decoder.moe_layers():
        assert isinstance(layer.experts, QuantizedExperts)
        assert layer.experts.weights.fc1.bits == (8 if dtype == "int8" else 4)
        there = copy.copy(layer.experts).to("meta").weights  # moving a module moves its values
        assert there.fc1.values.is_meta and there.fc2.scales_SQG.is_meta
    ids = some_ids()
    found, original = model(ids), moeyard.load(source)(ids)
    widened(model)
    assert (found - model(ids)).abs().max() <= 2e-3 * original.abs().max()
    lost = (found - original).norm() / original.norm()
    assert 1e-4 < lost < (0.1 if dtype == "int8" else 0.6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_offloaded_experts_in_few_bits_give_the_same_bits(source, tmp_path, dtype):
    convert(source, tmp_path / "few", dtype)
    resident = moeyard.load(tmp_path / "few")
    offloaded = moeyard.load(tmp_path / "few", expert_memory="30%")
    ids = some_ids()
    assert torch.equal(offloaded(ids), resident(ids))
    greedy = {"max_new_tokens": 12, "temperature": 0}
    assert torch.equal(offloaded.generate(ids, **greedy), resident.generate(ids, **greedy))


def test_what_is_in_few_bits_can_be_widened_again(source, tmp_path):
    convert(source, tmp_path / "int8", "int8")
    convert(tmp_path / "int8", tmp_path / "wide")
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())
    few = moeyard.load(tmp_path / "int8")
    widened(few)
    wide, ids = moeyard.load(tmp_path / "wide"), some_ids()
    assert torch.equal(wide(ids), few(ids)) or (wide(ids) - few(ids)).abs().max() <= 1e-4


def test_the_command_converts_and_keeps_what_it_does_not_know(tmp_path, capsys):
    save("mixtral", tmp_path / "m")
    path = tmp_path / "m/config.json"
    extra = {"initializer_range": 0.125, "auto_map": {"AutoModel": "code.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages }}")
    generation = {"eos_token_id": [5, 96], "do_sample": False, "temperature": 0.7}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(generation))
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "b"), "--dtype", "bf16"]) == 0
    assert "model_type=mixtral" in capsys.readouterr().out
    values = json.loads((tmp_path / "b/config.json").read_text())
    assert values["initializer_range"] == 0.125 and values["dtype"] == "bfloat16"
    assert "auto_map" not in values, "a folder's code does not fit what we write"
    assert (tmp_path / "b/chat_template.jinja").read_text() == "{{ messages }}"
    model = moeyard.load(tmp_path / "b")
    assert model.eos_ids == {5, 96} and model.sampling.temperature == 0
    tensors = load_file(tmp_path / "b/model.safetensors")
    kinds = {tensor.dtype for name, tensor in tensors.items() if ".gate." not in name}
    assert kinds == {torch.bfloat16}
    gates = [tensor for name, tensor in tensors.items() if "block_sparse_moe.gate." in name]
    assert {gate.dtype for gate in gates} == {torch.float32}, "routers stay in fp32"


def test_what_cannot_be_converted_gets_one_sentence(tmp_path):
    save("mixtral", tmp_path / "ragged")
    with pytest.raises(ConfigError, match="widths are 40 and 24, which must be multiples of 32"):
        convert(tmp_path / "ragged", tmp_path / "x", "int4")
    save("llama", tmp_path / "dense")
    with pytest.raises(ConfigError, match="dtype is int8, but the model has no experts"):
        convert(tmp_path / "dense", tmp_path / "x", "int8")
    with pytest.raises(ModelFileError, match="exists already"):
        convert(tmp_path / "dense", tmp_path / "ragged")
    assert not (tmp_path / "x").exists()


def test_weights_in_few_bits_that_are_not_there_are_missed(tmp_path):
    save("mixtral", tmp_path / "m", **WIDE, **EXPERTS["mixtral"])
    convert(tmp_path / "m", tmp_path / "few", "int4")
    path = tmp_path / "few/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight_scale"
    save_file({key: t for key, t in tensors.items() if key != name}, path)
    with pytest.raises(ModelFileError, match=f"has no tensor '{name}'"):
        moeyard.load(tmp_path / "few")
