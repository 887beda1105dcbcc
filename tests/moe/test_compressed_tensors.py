"""The bytes, names and configuration are those of compressed-tensors, there and back."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from moeyard.errors import ModelFileError
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.quantize import quantize
from moeyard.kernels.values.quantized_weights import QuantizedExpertWeights, empty_matrices
from moeyard.moe.folders.compressed_tensors import (
    PackedFormat,
    read_matrix,
    read_plain,
    slot_view,
    to_stored,
)
from moeyard.moe.folders.quantized_config import quantization_config, read_quantization_config
from moeyard.moe.folders.safetensors_file import SafetensorsFile

FORMATS = [(8, None), (8, 32), (4, 32), (4, 64)]
EACH_FORMAT = pytest.mark.parametrize(("bits", "group_size"), FORMATS)
NAME = "model.layers.0.mlp.experts.3.gate_proj.weight"
ROWS, WIDTH = 12, 128


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(bits, group_size):
    return quantize(random(1, ROWS, WIDTH), bits, group_size)


def reader_of(tensors):
    return lambda name, out: out.copy_(tensors[name])


def empty(bits, group_size, rows=ROWS, width=WIDTH):
    return empty_matrices(1, rows, width, bits, group_size or width, torch.device("cpu"))


# One row of 32 inputs: its words as numbers, and the values that they stand for.
BY_HAND = {
    4: ([0x76543210, 0xFEDCBA98] * 2, [*range(-8, 8)] * 2),
    8: ([0x807F0100, 0xFF008180] * 4, [-128, -127, -1, 0, 0, 1, -128, 127] * 4),
}


@pytest.mark.parametrize("bits", BY_HAND)
def test_words_written_by_hand_are_read_and_written(bits):
    words, values = BY_HAND[bits]
    stored = {
        f"{NAME}_packed": torch.tensor([words], dtype=torch.int64).to(torch.int32),
        f"{NAME}_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
        f"{NAME}_shape": torch.tensor([1, 32]),
    }
    found = empty(bits, None, 1, 32)
    read_matrix(reader_of(stored), NAME, slot_view(found, 0))
    assert found.dequantize(0, torch.float32).tolist() == [[value / 2 for value in values]]
    again = to_stored(NAME, slot_view(found, 0))
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)


@EACH_FORMAT
def test_matrices_survive_a_file(tmp_path, bits, group_size):
    expected = quantized(bits, group_size)
    stored = to_stored(NAME, slot_view(expected, 0))
    packed = PackedFormat(bits, group_size)
    described = {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()}
    assert packed.stored(NAME, ROWS, WIDTH) == described
    save_file(stored, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    found, plain = empty(bits, group_size), torch.empty(ROWS, WIDTH)
    read_matrix(file.read_into, NAME, slot_view(found, 0))
    read_plain(file.read_into, NAME, packed, plain)
    file.close()
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.scales_SQG, expected.scales_SQG)
    assert torch.equal(plain, expected.dequantize(0, torch.float32))


@EACH_FORMAT
def test_an_expert_is_read_into_its_slot_alone(bits, group_size):
    shapes = {"gate": (64, WIDTH), "up": (64, WIDTH), "down": (WIDTH, 64)}
    device = torch.device("cpu")
    fc1 = empty_matrices(3, 128, WIDTH, bits, group_size or WIDTH, device)
    fc2 = empty_matrices(3, WIDTH, 64, bits, group_size or 64, device)
    for tensor in (fc1.values, fc1.scales_SQG, fc2.values, fc2.scales_SQG):
        tensor.fill_(1)
    experts = QuantizedExpertWeights(fc1, fc2)
    wanted, views = {}, experts.slot_views(1)
    for seed, (part, shape) in enumerate(shapes.items()):
        wanted[part] = quantize(random(1, *shape, seed=seed), bits, group_size)
        stored = to_stored("x.weight", slot_view(wanted[part], 0))
        read_matrix(reader_of(stored), "x.weight", views[part])
    dense1, dense2 = experts.matrices(1, torch.float32)
    gate, up, down = (wanted[part].dequantize(0, torch.float32) for part in shapes)
    assert torch.equal(dense1, torch.cat((gate, up))) and torch.equal(dense2, down)
    for slot in (0, 2):
        assert (fc1.values[slot] == 1).all() and (fc2.scales_SQG[slot] == 1).all()


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, 32)])
def test_the_lowest_value_that_others_write_is_computed_with(bits, group_size, backend):
    """Our smallest values are -127 and -7; those of compressed-tensors are -128 and -8."""
    matrices = []
    for seed, (rows, width) in enumerate(((128, 96), (96, 64))):
        found = empty_matrices(2, rows, width, bits, group_size or width, torch.device("cpu"))
        g = torch.Generator().manual_seed(seed)
        low, high = (-128, 128) if bits == 8 else (0, 256)
        found.values.copy_(torch.randint(low, high, found.values.shape, generator=g))
        found.values[:, ::3] = -128 if bits == 8 else 0
        found.scales_SQG.copy_(random(*found.scales_SQG.shape, seed=seed).abs() / 2**bits)
        matrices.append(found)
    dense = [
        torch.stack([m.dequantize(slot, torch.float64) for slot in range(2)]) for m in matrices
    ]
    ids, weights = torch.tensor([[0, 1]] * 9), torch.rand(9, 2)
    x = random(9, 96)
    expected = expert_mlp(x.double(), ids, weights.double(), ExpertWeights(*dense), "reference")
    y = expert_mlp(x, ids, weights, QuantizedExpertWeights(*matrices), backend)
    assert (y - expected).abs().max() <= 2e-4 * expected.abs().max()


CONFIG = quantization_config(PackedFormat(4, 64), ["lm_head.weight"])


@EACH_FORMAT
def test_the_configuration_says_what_it_was_given(bits, group_size):
    packed = PackedFormat(bits, group_size)
    config = json.loads(json.dumps(quantization_config(packed, ["model.a.weight"])))
    assert read_quantization_config(config) == packed and config["ignore"] == ["model.a"]


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split("/")
    place = config
    for key in parents:
        place = place[key]
    place[last] = value
    return config


WEIGHTS = "config_groups/group_0/weights"
ASYMMETRIC = {**CONFIG["config_groups"]["group_0"]["weights"], "symmetric": False}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("quant_method", "gptq"), r"quant_method = 'gptq', which is not read; use a model"),
        ({"quant_method": "awq", "bits": 4}, "quant_method = 'awq'"),
        ({"bits": 4}, "quant_method = None"),
        ([], r"quantization_config = \[\]"),
        (changed("format", "float-quantized"), "format = 'float-quantized'"),
        (changed("config_groups", ["W4A16"]), r"config_groups = \['W4A16'\]"),
        (changed("config_groups/group_0", ["Linear"]), r"group_0 = \['Linear'\]"),
        (changed(WEIGHTS, ASYMMETRIC), r"weights\.symmetric = False"),
        (changed(f"{WEIGHTS}/num_bits", 3), "num_bits = 3"),
        (changed(f"{WEIGHTS}/num_bits", "4"), "num_bits = '4'"),
        (changed(f"{WEIGHTS}/type", "float"), "type = 'float'"),
        (changed(f"{WEIGHTS}/dynamic", True), "dynamic = True"),
        (changed(f"{WEIGHTS}/actorder", "group"), "actorder = 'group'"),
        (changed(f"{WEIGHTS}/strategy", "tensor"), "strategy = 'tensor'"),
        (changed(f"{WEIGHTS}/strategy", ["group"]), r"strategy = \['group'\]"),
        (changed(f"{WEIGHTS}/group_size", 48), "group_size = 48; only multiples of 32"),
        (changed(f"{WEIGHTS}/group_size", None), "group_size = None"),
        (changed(f"{WEIGHTS}/group_size", [64]), r"group_size = \[64\]"),
        (changed("config_groups/group_0/input_activations", {"num_bits": 8}), "input_activations"),
        (changed("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
        (changed("transform_config", {"config_groups": {"a": 1}}), "transform_config"),
        (
            changed("config_groups/other", {"targets": "Linear", "weights": {"group_size": -1}}),
            "other.targets = 'Linear'; use a list of names",
        ),
    ],
)
def test_other_kinds_get_one_sentence(config, message):
    with pytest.raises(ModelFileError, match=message) as caught:
        read_quantization_config(config)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_width_that_groups_do_not_divide_gets_one_sentence():
    with pytest.raises(ModelFileError, match="96 inputs in groups of 64; groups must divide"):
        PackedFormat(4, 64).stored(NAME, 8, 96)
    with pytest.raises(ModelFileError, match="40 inputs in groups of 40"):
        PackedFormat(8, None).stored(NAME, 8, 40)


def test_what_an_absent_key_means():
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}
    config = {**CONFIG, "config_groups": {"group_0": scheme}}
    assert read_quantization_config(config) == PackedFormat(4, 128)
    scheme["weights"] = {"group_size": -1}
    assert read_quantization_config(config) == PackedFormat(8, None)
