"""Recovery after pruning: layers come closer to the exact ones; the folder's format is the same."""

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.cli import main
from moeyard.kernels.values.sparsify import sparsify
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.blocks.momentum import Momentum
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.calibration import windows_of
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.group_sparse_format import GroupSparseFormat
from moeyard.moe.routers.topk import TopK
from moeyard.serving.pruning.recover import recover

from small_model import CONFIG, write_random_model

MOE = MoEConfig(num_experts=4, d_expert=96, router=TopK(k=2))
WIDE = CONFIG.model_copy(update={"d_model": 64, "moe": MOE})
TEXT = "".join(f"{n} brown foxes jump over {n * n} lazy dogs. " for n in range(60))
PACKED = GroupSparseFormat(0.5)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model and a text."""
    home = tmp_path_factory.mktemp("recovery")
    write_random_model(home / "plain", WIDE)
    (home / "text").write_text(TEXT)
    return home


def with_moe(folder, num_layers, **changes):
    """Write another model, and return its folder; layers 0 and 2 have experts."""
    moe = MOE.model_copy(update=changes)
    write_random_model(folder, WIDE.model_copy(update={"moe": moe, "num_layers": num_layers}))
    return folder


def recovered(folder, text):
    """Return a model whose experts were pruned, and the experts."""
    model, files = moeyard.load(folder), ModelFolder(folder)
    return model, recover(model.decoder, files, windows_of(model, text), PACKED)


def convert(folder, target, text, *options):
    command = ["convert", str(folder), str(target), "--dtype", "int4_sparse"]
    return main([*command, "--calibration", str(text), *options])


def rows_of(model, text):
    with torch.no_grad():
        return model.decoder(batch_of_rows(windows_of(model, text))).hidden_TD


@pytest.fixture(scope="module")
def models(home):
    """The exact model, and the model pruned without recovery and as convert does by default."""
    text = home / "text"
    found = {"exact": home / "plain", "none": home / "none", "fit": home / "fit"}
    assert convert(home / "plain", home / "none", text, "--recovery", "none") == 0
    assert convert(home / "plain", home / "fit", text) == 0
    return {name: moeyard.load(folder) for name, folder in found.items()}


def test_rows_come_closer_to_the_exact_ones(home, models):
    exact = rows_of(models["exact"], home / "text")
    off = {name: float((rows_of(m, home / "text") - exact).norm()) for name, m in models.items()}
    assert off["fit"] < 0.9 * off["none"], off


def test_the_error_of_a_layer_falls(home, models):
    """The first layer: there the rows of the exact model and the pruned one are the same."""
    layers = {name: model.decoder.moe_layers()[0][1].experts for name, model in models.items()}
    seen = []
    handle = layers["exact"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    rows_of(models["exact"], home / "text")
    handle.remove()
    with torch.no_grad():
        y = {name: experts(*seen[0]) for name, experts in layers.items()}
    off = {name: float((y[name] - y["exact"]).norm()) for name in y}
    assert off["fit"] < 0.9 * off["none"], off


def test_the_format_is_that_of_pruning_alone(home, models):
    plain, fitted = (load_file(home / name / "model.safetensors") for name in ("none", "fit"))
    assert plain.keys() == fitted.keys()
    assert all((t.dtype, t.shape) == (plain[n].dtype, plain[n].shape) for n, t in fitted.items())
    texts = [(home / name / "config.json").read_text() for name in ("none", "fit")]
    assert texts[0] == texts[1]
    offloaded = moeyard.load(home / "fit", expert_memory="25%")
    assert torch.equal(rows_of(offloaded, home / "text"), rows_of(models["fit"], home / "text"))


def test_the_same_text_gives_the_same_experts(home):
    _, first = recovered(home / "plain", home / "text")
    fitted = load_file(home / "fit" / "model.safetensors")
    for layer in (0, 2):
        for part in ("gate", "up", "down"):
            name = f"model.layers.{layer}.mlp.experts.3.{part}_proj.weight"
            view = first.pruned(layer, 3, part, torch.empty(0), 0)
            stored = [fitted[f"{name}_{kind}"] for kind in ("packed", "columns", "scale")]
            assert all(torch.equal(a, b) for a, b in zip(view, stored, strict=True))


def test_experts_with_fewer_rows_than_inputs_are_pruned_alone(home, tmp_path, caplog):
    folder = with_moe(tmp_path / "many", 2, num_experts=16, router=TopK(k=1))
    exact, seen = moeyard.load(folder), []
    experts = exact.decoder.moe_layers()[0][1].experts
    experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    rows_of(exact, home / "text")
    x, ids = seen[0]
    rows = torch.bincount(ids.flatten(), minlength=16)
    few, many = (rows < 96).nonzero().flatten(), (rows >= 96).nonzero().flatten()
    enough = few[rows[few] >= 64]
    assert len(enough) and len(many), rows
    assert convert(folder, tmp_path / "out", home / "text") == 0
    assert int(caplog.text.split(" experts saw few rows")[0].split()[-1]) >= len(few)
    assert "are pruned without recovery; give a longer text." in caplog.text
    pruned = moeyard.load(tmp_path / "out").decoder.moe_layers()[0][1].experts.weights.fc1
    for expert, is_plain in ((enough[0], True), (many[0], False)):
        importance = x[(ids == expert).any(dim=1)].square().mean(dim=0)
        plain = sparsify(experts.fc1[expert].detach(), importance, 1)
        assert torch.equal(pruned.values[expert], plain.values_QB) == is_plain


@pytest.mark.parametrize(
    "changes", [{"block": Momentum()}, {"expert_bias": True}, {"activation": "relu"}], ids=str
)
def test_other_blocks_and_experts_are_recovered_too(home, tmp_path, changes):
    folder = with_moe(tmp_path / "plain", 3 if "block" in changes else 2, **changes)
    exact, text = rows_of(moeyard.load(folder), home / "text"), home / "text"
    assert convert(folder, tmp_path / "none", text, "--recovery", "none") == 0
    none = rows_of(moeyard.load(tmp_path / "none"), text)
    fit = rows_of(recovered(folder, text)[0], text)
    assert (fit - exact).norm() < 0.95 * (none - exact).norm()


def test_recovery_is_for_pruned_experts_only(home, tmp_path, capsys):
    command = ["convert", str(home / "plain"), str(tmp_path / "out"), "--dtype", "int4"]
    assert main([*command, "--recovery", "fit"]) == 2
    assert "--recovery is for --dtype int4_sparse" in capsys.readouterr().err
