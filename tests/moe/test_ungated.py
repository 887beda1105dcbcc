"""Experts without a gate (relu, gelu): two matrices in layers, folders, formats and stores.

D model width, F expert width, E experts.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.errors import ConfigError, ModelFileError
from moeyard.kernels.values.activation import UNGATED
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.experts.inner_slice import InnerSlice
from moeyard.moe.experts.resident import Experts
from moeyard.moe.folders.convert import convert
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.describe import count_parameters
from moeyard.moe.models.initialize import initialize
from moeyard.parallel.simulation.sizes import Sizes
from moeyard.serving.evaluation.measure_sparsity import measure_sparsity

from small_model import CONFIG, write_decoder

D, WIDTH, E = 7, 5, 4
IDS_BT = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(9))
ACTIVATIONS = pytest.mark.parametrize("activation", UNGATED)


def decoder_of(activation="relu", **options) -> Decoder:
    moe = MoEConfig(num_experts=E, d_expert=32, activation=activation, d_shared=12, **options)
    decoder = Decoder(CONFIG.model_copy(update={"moe": moe, "d_model": 32}))
    initialize(decoder, 5)
    torch.manual_seed(0)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        if "lm_head" in name or "embed" in name:
            parameter.data *= 20
    return decoder.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of ReLU experts with biases and a shared expert."""
    path = tmp_path_factory.mktemp("ungated") / "m"
    write_decoder(path, decoder_of(expert_bias=True), eos_id=256)
    return path


@torch.no_grad()
def logits(decoder: Decoder) -> torch.Tensor:
    return decoder.logits(decoder(batch_of_rows(IDS_BT)).hidden_TD)


@ACTIVATIONS
def test_a_layer_is_two_matrices_with_the_activation_between(activation):
    layer = moeyard.MoELayer(
        D, WIDTH, E, moeyard.TopK(k=2), activation, d_shared=3, expert_bias=True
    ).double()
    torch.nn.init.normal_(layer.experts.fc1_bias)
    torch.nn.init.normal_(layer.experts.fc2_bias)
    act = {"relu": F.relu, "gelu": F.gelu}[activation]
    x = torch.randn(9, D, dtype=torch.float64)
    y, routing = layer(x)
    experts, shared = layer.experts, layer.shared_expert
    expected = act(x @ shared.up_proj.weight.T) @ shared.down_proj.weight.T
    for token in range(len(x)):
        pairs = zip(routing.experts_TK[token], routing.weights_TK[token], strict=True)
        for expert, weight in pairs:
            hidden = act(experts.fc1[expert] @ x[token] + experts.fc1_bias[expert])
            expected[token] += weight * (experts.fc2[expert] @ hidden + experts.fc2_bias[expert])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    assert shared.gate_proj is None and experts.fc1.shape == (E, WIDTH, D)


@ACTIVATIONS
def test_parameters_are_counted_as_they_are(activation):
    decoder = decoder_of(activation, expert_bias=True)
    total = sum(parameter.numel() for parameter in decoder.parameters())
    assert count_parameters(decoder)[0] == total == Sizes.of(decoder.config).total


def test_the_folder_names_no_gate_and_keeps_every_bit(folder):
    names = load_file(folder / "model.safetensors").keys()
    of_experts = {name for name in names if ".experts.3." in name}
    path = "model.layers.2.mlp.experts.3"
    assert {name for name in of_experts if name.startswith(path)} == {
        f"{path}.{part}_proj.{leaf}" for part in ("up", "down") for leaf in ("weight", "bias")
    }
    assert not any("gate_proj" in name for name in names if ".layers.1." not in name)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "moeyard"
    assert logits(moeyard.load(folder).decoder).equal(logits(decoder_of(expert_bias=True)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_store_of_few_slots_has_the_resident_bits_in_every_format(folder, tmp_path, dtype):
    convert(folder, tmp_path / "m", dtype=dtype)
    plain, resident = moeyard.load(folder), moeyard.load(tmp_path / "m")
    expected = logits(resident.decoder)
    served = moeyard.load(tmp_path / "m", expert_memory="50%")
    assert served.decoder.moe_layers()[0][1].experts.share_in_memory < 1
    assert logits(served.decoder).equal(expected)
    error = (expected.float() - logits(plain.decoder)).norm() / expected.float().norm()
    assert error <= {"fp32": 0, "bf16": 0.05, "int8": 0.05, "int4": 0.5}[dtype]
    assert (error > 0) == (dtype != "fp32")


def test_channels_that_a_relu_makes_0_are_left_out_without_a_change(folder):
    exact = moeyard.load(folder, expert_sparsity="exact")
    assert logits(exact.decoder).equal(logits(moeyard.load(folder).decoder))


def test_scores_of_gates_are_refused(folder):
    model = moeyard.load(folder)
    with pytest.raises(ConfigError, match=r"score is cats, .* relu experts have none; use teal"):
        measure_sparsity(model, "to be or not to be " * 120, "cats", 0.4, 64)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("relu", "swiglu", r"no tensor .*gate_proj.weight.*config.json asks for"),
        ("swiglu", "relu", r"gate_proj.weight"),
    ],
)
def test_a_folder_whose_tensors_have_another_gate_is_refused(tmp_path, before, after, sentence):
    write_decoder(tmp_path / "m", decoder_of(before), eos_id=256)
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace(f'"{before}"', f'"{after}"'))
    with pytest.raises(ModelFileError, match=sentence):
        moeyard.load(tmp_path / "m")


@ACTIVATIONS
def test_slices_of_the_inner_width_add_up_to_whole_experts(activation):
    def made(inner_slice=None) -> Experts:
        torch.manual_seed(0)
        experts = Experts(D, 6, E, backend="reference", activation=activation, bias=True).double()
        torch.nn.init.normal_(experts.fc1_bias)
        torch.nn.init.normal_(experts.fc2_bias)
        if inner_slice is not None:
            experts.keep_slice(inner_slice)
        return experts

    slices = [InnerSlice(index, 3, 1) for index in range(3)]
    rows = torch.randn(9, D).double(), torch.randint(-1, E, (9, 2)), torch.rand(9, 2).double()
    whole, parts = made(), [made(inner_slice) for inner_slice in slices]
    torch.testing.assert_close(sum(part(*rows) for part in parts), whole(*rows))
    for name in ("fc1", "fc2", "fc1_bias"):
        total = torch.zeros_like(whole.get_parameter(name)[1])
        for inner_slice, part in zip(slices, parts, strict=True):
            for start, piece in inner_slice.pieces(name, part.get_parameter(name).data[1]):
                ends = zip(start, piece.shape, strict=True)
                total[tuple(slice(s, s + n) for s, n in ends)] += piece
        assert total.equal(whole.get_parameter(name)[1])


def test_a_folder_may_have_its_experts_by_name_only(folder, tmp_path):
    """A file with transformers' fused gate_up_proj is no expert without a gate."""
    shutil.copytree(folder, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    ups = [n for n in tensors if ".experts." in n and "up_proj.weight" in n and ".layers.0." in n]
    fused = torch.stack([tensors.pop(name) for name in ups])
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.cat([fused, fused], dim=1)
    save_file(tensors, file)
    with pytest.raises(ModelFileError, match=r"experts.0.up_proj.weight"):
        moeyard.load(tmp_path / "m")
