"""Folders with 2:4 experts: packed, opened, offloaded and widened without a changed bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError, ModelFileError, MoeyardError
from moeyard.kernels.values.n_of_m import keep_mask, masked
from moeyard.kernels.values.two_of_four import PATTERN, TwoOfFourExpertWeights
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.topk import TopK
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.planning.lossy import lossy_modes

from small_model import CONFIG, write_decoder, write_random_model

WIDE = CONFIG.model_copy(
    update={"d_model": 64, "moe": MoEConfig(num_experts=6, d_expert=96, router=TopK(k=2))}
)
FIRST = "model.layers.0.mlp.experts.0.gate_proj.weight"


def write_pruned(folder, config=WIDE):
    """Write a model whose experts are 2:4."""
    model = Decoder(config)
    initialize(model, 5)
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed" in name:
            parameter.data *= 20
        if name.endswith(("fc1", "fc2")):
            parameter.data = masked(parameter.data, keep_mask(parameter.data, PATTERN))
    write_decoder(folder, model, eos_id=256)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The model in fp32, in bf16 and packed."""
    home = tmp_path_factory.mktemp("two_of_four")
    write_pruned(home / "fp32")
    for source, target, dtype in (("fp32", "bf16", "bf16"), ("bf16", "packed", "2:4")):
        assert main(["convert", str(home / source), str(home / target), "--dtype", dtype]) == 0
    return home


def some_ids():
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("expert_memory", [None, "25%"])
def test_answers_have_the_bits_of_the_plain_folder(home, dtype, expert_memory):
    plain = moeyard.load(home / "bf16", dtype)
    model = moeyard.load(home / "packed", dtype, expert_memory=expert_memory)
    for ids_BT in (some_ids(), some_ids()[:1, :1]):
        assert torch.equal(model(ids_BT), plain(ids_BT))
    if expert_memory is None:
        weights = model.decoder.moe_layers()[0][1].experts.weights
        assert isinstance(weights, TwoOfFourExpertWeights)


def test_an_expert_is_one_extent_of_fewer_bytes(home):
    (chunk,) = ModelFolder(home / "packed").expert_chunks(0, 3)
    assert chunk.end - chunk.start == 0.5625 * 3 * 64 * 96 * 2
    assert lossy_modes(ModelFolder(home / "packed"), StoreOptions()) == []


def test_widened_it_is_the_plain_folder_again(home, tmp_path):
    convert(home / "packed", tmp_path / "wide", "bf16")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "wide", home / "bf16"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())
    convert(home / "fp32", tmp_path / "direct", "2:4")
    files = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "direct", home / "packed")]
    assert files[0] == files[1]


def test_plan_and_generate_take_the_folder(home, capsys):
    assert main(["generate", str(home / "packed"), "ab", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["plan", str(home / "packed"), "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["sizes"]
    assert sizes["expert_bytes"] == sizes["stored_expert_bytes"] == 0.5625 * 3 * 64 * 96 * 2


def test_biases_stay_plain(tmp_path):
    moe = MoEConfig(num_experts=4, d_expert=32, router=TopK(k=2), expert_bias=True)
    write_pruned(tmp_path / "plain", WIDE.model_copy(update={"moe": moe}))
    convert(tmp_path / "plain", tmp_path / "packed", "2:4")
    convert(tmp_path / "plain", tmp_path / "bf16", "bf16")
    plain, packed = (moeyard.load(tmp_path / name) for name in ("bf16", "packed"))
    assert torch.equal(packed(some_ids()), plain(some_ids()))


def test_what_is_not_two_of_four_is_refused(tmp_path, capsys):
    write_random_model(tmp_path / "dense", WIDE)
    command = ["convert", str(tmp_path / "dense"), str(tmp_path / "out"), "--dtype", "2:4"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"dtype is 2:4, but {FIRST} has more than 2 weights in inputs" in error
    assert "train with train.sparse_experts" in error and not (tmp_path / "out").exists()
    write_random_model(tmp_path / "odd")
    with pytest.raises(ConfigError, match="24 and 20, which must be multiples of 8"):
        convert(tmp_path / "odd", tmp_path / "out", "2:4")


def changed(home, tmp_path, change=None, key=None, value=None):
    """Return a copy of the packed folder with other tensors or another configuration."""
    folder = tmp_path / "copy"
    shutil.copytree(home / "packed", folder)
    (folder / "expert_hashes.json").unlink()
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if key is not None:
        values = json.loads((folder / "config.json").read_text())
        values["quantization_config"][key] = value
        (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("expert_memory", [None, "25%"])
def test_damaged_places_are_refused_before_anything_computes_with_them(
    home, tmp_path, expert_memory
):
    folder = changed(home, tmp_path, lambda tensors: tensors[f"{FIRST}_places"].fill_(0))
    with pytest.raises(MoeyardError, match="places do not name two inputs of each four"):
        moeyard.load(folder, expert_memory=expert_memory)(some_ids())
    with pytest.raises(ModelFileError, match="places do not name two inputs of each four"):
        convert(folder, tmp_path / "wide", "bf16")


def test_other_types_and_configurations_are_refused(home, tmp_path):
    def to_float(tensors):
        tensors[f"{FIRST}_places"] = tensors[f"{FIRST}_places"].float()

    with pytest.raises(MoeyardError):
        moeyard.load(changed(home, tmp_path, lambda tensors: tensors.pop(f"{FIRST}_places")))
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ModelFileError, match=r"quantization_config.m = 8; only 4 is read"):
        moeyard.load(changed(home, tmp_path, key="m", value=8))
