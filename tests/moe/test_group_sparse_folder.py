"""Folders with group-sparse experts: written, opened, offloaded, widened; damage is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError, DataError, ModelFileError, MoeyardError
from moeyard.kernels.values.group_sparse import GroupSparseExpertWeights, widened
from moeyard.kernels.values.sparsify import sparsify
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders import calibration
from moeyard.moe.folders.calibration import calibrate
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routers.topk import TopK
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.planning.lossy import lossy_modes

from small_model import CONFIG, write_random_model

WIDE = CONFIG.model_copy(
    update={"d_model": 64, "moe": MoEConfig(num_experts=6, d_expert=96, router=TopK(k=2))}
)
FIRST = "model.layers.0.mlp.experts.0.gate_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A plain model, a text, and the model with a third of its groups pruned."""
    home = tmp_path_factory.mktemp("sparse")
    write_random_model(home / "plain", WIDE)
    (home / "text").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    command = ["convert", str(home / "plain"), str(home / "sparse"), "--dtype", "int4_sparse"]
    options = ["--sparsity", "0.34", "--recovery", "none"]
    assert main([*command, "--calibration", str(home / "text"), *options]) == 0
    return home


def some_ids():
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def copied(home, tmp_path, change=None, without_hashes=True):
    """Return a copy of the folder whose tensors ``change`` may change."""
    folder = tmp_path / "copy"
    shutil.copytree(home / "sparse", folder)
    if without_hashes:
        (folder / "expert_hashes.json").unlink()
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_folder_has_the_weights_that_the_calibration_chose(home):
    model, folder = moeyard.load(home / "plain"), ModelFolder(home / "plain")
    found = calibrate(model, folder, home / "text")
    experts = moeyard.load(home / "sparse").decoder.moe_layers()
    assert len(experts) == 2
    for layer, module in experts:
        weights = module.experts.weights
        assert isinstance(weights, GroupSparseExpertWeights)
        assert (weights.fc1.kept, weights.fc2.kept) == (1, 2)
        plain = dict(model.decoder.moe_layers())[layer].experts
        for expert in range(6):
            fc1, fc2 = weights.matrices(expert, torch.float32)
            for part, kept, whole, name in (
                (fc1[:96], 1, plain.fc1[expert, :96], "gate"),
                (fc1[96:], 1, plain.fc1[expert, 96:], "up"),
                (fc2, 2, plain.fc2[expert], "down"),
            ):
                importance = found.importance(layer, expert, name)
                expected = widened(sparsify(whole, importance, kept), torch.float32)
                assert torch.equal(part, expected)


def test_statistics_are_means_over_the_rows_of_an_expert_or_of_the_layer(home, monkeypatch):
    monkeypatch.setattr(calibration, "FEW_ROWS", 550)
    model, folder = moeyard.load(home / "plain"), ModelFolder(home / "plain")
    seen = []
    experts = dict(model.decoder.moe_layers())[2].experts
    experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    found = calibration.calibrate(model, folder, home / "text")
    (x, ids) = seen[0]
    rows = [int((ids == e).sum()) for e in range(6)]
    assert max(rows) > 550 > min(rows), "the text does not show both cases"
    for expert in range(6):
        has_few = rows[expert] < 550
        mine = x[(ids == expert).any(dim=1)]
        inputs = x.repeat_interleave(2, dim=0) if has_few else mine
        expected = inputs.double().square().mean(dim=0)
        torch.testing.assert_close(found.importance(2, expert, "gate"), expected, rtol=1e-5, atol=0)
        sample = x[:: len(x) // 550][:550] if has_few else mine
        gate, up = (part @ sample.T for part in experts.fc1[expert].chunk(2))
        hidden = (torch.nn.functional.silu(gate) * up).double().square().mean(dim=1)
        down = found.importance(2, expert, "down")
        torch.testing.assert_close(down, hidden, rtol=1e-3, atol=1e-9)
    assert found.few_rows() >= sum(count < 550 for count in rows) > 0


def test_an_expert_is_one_extent_of_the_bytes_that_it_should_have(home):
    folder = ModelFolder(home / "sparse")
    (chunk,) = folder.expert_chunks(0, 3)
    groups = 2 * 96 * 1 + 64 * 2
    assert chunk.end - chunk.start == groups * (16 + 1 + 2)
    assert lossy_modes(folder, StoreOptions()) == ["int4_sparse"]
    plain = ModelFolder(home / "plain").expert_chunks(0, 3)
    assert sum(c.end - c.start for c in plain) == 3 * 64 * 96 * 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offloaded_answers_have_the_bits_of_those_in_memory(home, dtype):
    expected = moeyard.load(home / "sparse", dtype)(some_ids())
    found = moeyard.load(home / "sparse", dtype, expert_memory="25%")(some_ids())
    assert torch.equal(found, expected)
    exact = moeyard.load(home / "plain", dtype)(some_ids())
    assert not torch.allclose(found, exact, atol=1e-2)


def test_widened_it_computes_the_same(home, tmp_path, capsys):
    assert main(["convert", str(home / "sparse"), str(tmp_path / "wide"), "--dtype", "fp32"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())
    found = moeyard.load(tmp_path / "wide")(some_ids())
    expected = moeyard.load(home / "sparse")(some_ids())
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_plan_and_generate_take_the_folder(home, capsys):
    assert main(["generate", str(home / "sparse"), "ab", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["plan", str(home / "sparse"), "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["sizes"]
    assert sizes["expert_bytes"] == sizes["stored_expert_bytes"] == 320 * 19


def test_biases_stay_plain(tmp_path):
    moe = MoEConfig(num_experts=4, d_expert=32, router=TopK(k=2), expert_bias=True)
    write_random_model(tmp_path / "plain", WIDE.model_copy(update={"moe": moe}))
    (tmp_path / "text").write_text("some words to go by, " * 60)
    model, folder = moeyard.load(tmp_path / "plain"), ModelFolder(tmp_path / "plain")
    found = calibrate(model, folder, tmp_path / "text")
    convert(tmp_path / "plain", tmp_path / "sparse", "int4_sparse", sparsity=0, pruner=found)
    exact, few = model(some_ids()), moeyard.load(tmp_path / "sparse")(some_ids())
    assert (few - exact).norm() < 0.2 * exact.norm()


def columns_to(value, dtype=torch.uint8):
    def change(tensors):
        columns = tensors[f"{FIRST}_columns"]
        columns[5] = value
        tensors[f"{FIRST}_columns"] = columns.to(dtype)

    return change


@pytest.mark.parametrize("expert_memory", [None, "25%"])
def test_a_column_outside_the_row_is_refused_before_anything_computes_with_it(
    home, tmp_path, expert_memory
):
    folder = copied(home, tmp_path, columns_to(2))
    with pytest.raises(MoeyardError, match="columns do not ascend from 0 to 1"):
        moeyard.load(folder, expert_memory=expert_memory)(some_ids())


def test_damage_is_refused_when_widening_too(home, tmp_path):
    folder = copied(home, tmp_path, columns_to(255))
    with pytest.raises(ModelFileError, match="columns do not ascend"):
        convert(folder, tmp_path / "wide", "bf16")
    assert not (tmp_path / "wide").exists()


def test_changed_bytes_are_found_by_their_hash(home, tmp_path):
    folder = copied(home, tmp_path, columns_to(1), without_hashes=False)
    with pytest.raises(ModelFileError, match="has other bytes"):
        moeyard.load(folder)


def test_tensors_of_other_types_and_shapes_are_refused(home, tmp_path):
    folder = copied(home, tmp_path, lambda t: t.pop(f"{FIRST}_scale"))
    with pytest.raises(ModelFileError, match="no tensor"):
        moeyard.load(folder)
    path = tmp_path / "copy" / "model.safetensors"
    path.write_bytes((home / "sparse/model.safetensors").read_bytes()[:-500])
    with pytest.raises(ModelFileError, match="cut short"):
        moeyard.load(folder)


def test_columns_of_another_type_are_refused(home, tmp_path):
    folder = copied(home, tmp_path, columns_to(-1, torch.int16))
    with pytest.raises(MoeyardError):
        moeyard.load(folder)(some_ids())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sparsity", 1.5, "sparsity = 1.5"),
        ("sparsity", "half", "sparsity = 'half'"),
        ("sparsity", 0.9, "has shape"),
        ("group_size", 16, "group_size = 16"),
        ("bits", 3, "bits = 3"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(home, tmp_path, key, value, message):
    folder = copied(home, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelFileError, match=message):
        moeyard.load(folder)


def test_requests_that_cannot_work_are_refused_in_one_sentence(home, tmp_path, capsys):
    short = tmp_path / "short"
    short.write_text("few words")
    text, out = str(home / "text"), str(tmp_path / "out")

    def refused(*arguments):
        source = str(home / "plain")
        assert main(["convert", source, out, *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    sparse = ("--dtype", "int4_sparse")
    assert "needs a text" in refused(*sparse)
    assert "--calibration is for --dtype mixed and int4_sparse" in refused(
        "--dtype", "int4", "--calibration", text
    )
    assert "has 9 tokens; give a text of" in refused(*sparse, "--calibration", str(short))
    assert "cannot be read" in refused(*sparse, "--calibration", str(tmp_path / "none"))
    assert "sparsity is 0.95" in refused(*sparse, "--calibration", text, "--sparsity", "0.95")
    assert "--sparsity is for --dtype int4_sparse" in refused(
        "--dtype", "int4", "--sparsity", "0.5"
    )


def test_widths_that_groups_do_not_divide_are_refused(home, tmp_path):
    write_random_model(tmp_path / "odd")
    with pytest.raises(ConfigError, match="24 and 20, which must be multiples of 32"):
        convert(tmp_path / "odd", tmp_path / "out", "int4_sparse")
    with pytest.raises(ConfigError, match="needs a calibration"):
        convert(home / "plain", tmp_path / "out", "int4_sparse")
    folder = ModelFolder(home / "plain")
    with pytest.raises(DataError, match="cannot be read"):
        calibrate(moeyard.load(home / "plain"), folder, tmp_path / "none")
    with safe_open(home / "sparse/model.safetensors", "pt") as file:
        assert f"{FIRST}_columns" in file.keys()  # noqa: SIM118
