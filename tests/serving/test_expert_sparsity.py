"""Channels of experts that count as 0: thresholds from a text, models that skip, bad input."""

from dataclasses import replace

import pytest
import torch

from moeyard.cli import main
from moeyard.errors import ConfigError, DataError
from moeyard.kernels.values.activation import gated
from moeyard.kernels.values.channel_weights import gate_values
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.evaluation.allocate_sparsity import last_rows
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.evaluation.measure_sparsity import measure_sparsity, observing
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.sparsity import KINDS, SCORES, read_sparsity, save_sparsity
from moeyard.serving.loading import load
from moeyard.serving.planning.lossy import lossy_modes

from small_model import CONFIG, slots, write_random_model

TEXT = "".join(f"{n} times {n} is {n * n}. " for n in range(130))
HELD_OUT = "".join(f"{n} and {n} are {n + n}. " for n in range(130, 230))


def config(activation="swiglu"):
    return CONFIG.model_copy(
        update={"moe": CONFIG.moe.model_copy(update={"activation": activation})}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("skip") / "model"
    write_random_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def relu_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("skip") / "relu"
    write_random_model(path, config("reglu"))
    return path


@pytest.fixture(scope="module")
def measured(model):
    return {score: measure_sparsity(model, TEXT, score, 0.5, 64) for score in SCORES}


class Counter:
    """Counts which values of each kind are at most their limits."""

    def __init__(self, sparsity):
        self.sparsity, self.below, self.all = sparsity, {}, {}

    def see(self, layer, expert, experts, x_nD, h_nH):
        limits = self.sparsity.limits(layer, x_nD.shape[1], h_nH.shape[1] // 2)
        values = {
            "x": (x_nD, limits.x_ED),
            "gate": (gate_values(h_nH, experts.activation), limits.gate_EF),
            "act": (gated(h_nH, experts.activation), limits.act_EF),
        }
        for kind in KINDS[self.sparsity.score]:
            found, limits_EC = values[kind]
            below = found.float().abs() <= limits_EC[expert]
            self.below[kind] = self.below.get(kind, 0) + int(below.sum())
            self.all[kind] = self.all.get(kind, 0) + below.numel()


@pytest.mark.parametrize("score", SCORES)
def test_the_target_is_met_on_a_text_that_was_not_measured(model, measured, score):
    counter = Counter(measured[score])
    with observing(model, counter):
        score_text(model, HELD_OUT, 64)
    for kind in KINDS[score]:
        assert abs(counter.below[kind] / counter.all[kind] - 0.5) < 0.02, kind


@pytest.mark.parametrize("score", SCORES)
def test_thresholds_of_zero_change_no_bit(folder, model, measured, score, tmp_path):
    found = measured[score]
    zero = {key: torch.zeros_like(t) for key, t in found.thresholds.items()}
    save_sparsity(tmp_path / "zero", replace(found, thresholds=zero))
    ids_BT = torch.tensor([list(TEXT[:40].encode())])
    for memory in (None, slots(3)):
        sparse = load(folder, expert_sparsity=tmp_path / "zero", expert_memory=memory)
        assert torch.equal(sparse(ids_BT), model(ids_BT))


@pytest.mark.parametrize("score", SCORES)
def test_a_model_that_skips_is_lossy_and_the_same_from_disk(
    folder, model, measured, score, tmp_path
):
    save_sparsity(tmp_path / "file", measured[score])
    ids_BT = torch.tensor([list(TEXT[:40].encode())])
    sparse = load(folder, expert_sparsity=str(tmp_path / "file"))
    stored = load(folder, expert_sparsity=str(tmp_path / "file"), expert_memory=slots(3))
    assert torch.equal(sparse(ids_BT), stored(ids_BT))
    assert not torch.allclose(sparse(ids_BT), model(ids_BT), rtol=1e-2)
    files, options = ModelFolder(folder), StoreOptions(sparsity=str(tmp_path / "file"))
    assert lossy_modes(files, options) == [f"expert-sparsity {score} 0.5"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exact_skips_what_relu_makes_zero_and_changes_no_bit(relu_folder, dtype):
    dense = load(relu_folder, dtype)
    ids_BT = torch.tensor([list(TEXT[:60].encode())])
    size = slots(3, "float32" if dtype == "fp32" else "bfloat16")
    for memory in (None, size):
        skips = load(relu_folder, dtype, expert_sparsity="exact", expert_memory=memory)
        assert torch.equal(skips(ids_BT), dense(ids_BT))
        assert skips.generate("1 and", 20, 0, seed=0) == dense.generate("1 and", 20, 0, seed=0)
    assert lossy_modes(ModelFolder(relu_folder), StoreOptions(sparsity="exact")) == []


class FirstProduct:
    """The error of an expert's first product, in one layer, that limits of its input make."""

    def __init__(self, limits):
        self.limits, self.squares = limits, 0.0

    def see(self, layer, expert, experts, x_nD, h_nH):
        if layer == 0:
            gone_nD = torch.where(x_nD.abs() <= self.limits.x_ED[expert], x_nD, 0)
            self.squares += float((gone_nD @ experts.fc1[expert].mT).square().sum())


def test_wina_loses_less_than_teal_on_columns_of_different_size(model):
    """At equal sparsity, for the first product of an expert."""
    experts = model.decoder.moe_layers()[0][1].experts
    before, errors = experts.fc1.data.clone(), {}
    experts.fc1.data *= torch.logspace(-1, 1, 24)
    try:
        for score in ("teal", "wina"):
            limits = measure_sparsity(model, TEXT, score, 0.5, 64).limits(0, 24, 20)
            observer = FirstProduct(limits)
            with observing(model, observer):
                score_text(model, HELD_OUT, 64)
            errors[score] = observer.squares
    finally:
        experts.fc1.data = before
    assert errors["wina"] < 0.7 * errors["teal"]


@pytest.mark.parametrize("score", ["teal", "wina"])
def test_a_greedy_share_meets_the_target_and_gives_a_nearer_output(model, score):
    """Of a layer's weights: two thirds are the first product's."""
    experts = model.decoder.moe_layers()[0][1].experts
    before = experts.fc2.data.clone()
    experts.fc2.data *= torch.logspace(-2, 2, 20)  # most channels of the second one do not matter
    try:
        rows, outputs = last_rows(model, HELD_OUT, 64)[0], {}
        for allocation in ("uniform", "greedy"):
            found = measure_sparsity(model, TEXT, score, 0.4, 64, allocation)
            counter = Counter(found)
            with observing(model, counter):
                score_text(model, HELD_OUT, 64)
            share = {kind: counter.below[kind] / counter.all[kind] for kind in ("x", "act")}
            assert abs(2 / 3 * share["x"] + 1 / 3 * share["act"] - 0.4) < 0.02, share
            outputs[allocation] = rows.output(found.limits(0, 24, 20)) - rows.output(None)
    finally:
        experts.fc2.data = before
    assert outputs["greedy"].norm() < 0.95 * outputs["uniform"].norm()


def test_the_rows_that_a_greedy_search_looks_at_are_those_of_the_layer(model):
    """Its fp32 output is that of the experts, for all rows of a short text."""
    seen = {}
    experts = model.decoder.moe_layers()[0][1].experts
    handle = experts.register_forward_hook(lambda _, args, out: seen.update(args=args, out=out))
    try:
        rows = last_rows(model, HELD_OUT[:65], 64)[0]
    finally:
        handle.remove()
    torch.testing.assert_close(rows.output(None), seen["out"], rtol=1e-4, atol=1e-5)


def test_the_command_writes_a_file_that_others_take(folder, tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "file"
    text.write_text(TEXT)
    given = [str(folder), "--text", str(text)]
    assert main(["sparsity", *given, "--score", "chess", "-o", str(out), "--length", "64"]) == 0
    assert read_sparsity(str(out)).name == "expert-sparsity chess 0.4"
    assert main(["eval", *given, "--length", "64", "--expert-sparsity", str(out)]) == 0
    assert "perplexity=" in capsys.readouterr().out
    nowhere = str(tmp_path / "none" / "file")
    assert main(["sparsity", *given, "--score", "chess", "-o", nowhere, "--length", "64"]) == 2
    assert "which cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_file_of_another_model_is_refused(measured, relu_folder, folder, tmp_path):
    save_sparsity(tmp_path / "file", measured["teal"])
    with pytest.raises(ConfigError, match="another model: its architecture"):
        load(relu_folder, expert_sparsity=tmp_path / "file")
    with pytest.raises(ConfigError, match="another model: its dtype"):
        load(folder, "bf16", expert_sparsity=tmp_path / "file")
    owner = replace(measured["teal"].owner, weights="0" * 16)
    save_sparsity(tmp_path / "other", replace(measured["teal"], owner=owner))
    with pytest.raises(ConfigError, match="another model: its weights"):
        load(folder, expert_sparsity=tmp_path / "other")


def test_bad_input_is_one_sentence(model, folder, measured, tmp_path):
    with pytest.raises(DataError, match="give one of 2000 or more"):
        measure_sparsity(model, "too short", "teal", 0.4)
    with pytest.raises(ConfigError, match=r"target is 1\.2"):
        measure_sparsity(model, TEXT, "teal", 1.2)
    with pytest.raises(ConfigError, match="allocation is greedy, but score is cats"):
        measure_sparsity(model, TEXT, "cats", 0.4, allocation="greedy")
    with pytest.raises(ConfigError, match=r"target is 0\.97; greedy allocation takes"):
        measure_sparsity(model, TEXT, "teal", 0.97, allocation="greedy")
    (tmp_path / "text").write_text("no thresholds")
    for name in ("text", "missing"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(folder, expert_sparsity=tmp_path / name)
    some = dict(list(measured["wina"].thresholds.items())[:-1])
    save_sparsity(tmp_path / "part", replace(measured["wina"], thresholds=some))
    with pytest.raises(ConfigError, match="arrays do not fit"):
        load(folder, expert_sparsity=tmp_path / "part")


def test_quantized_experts_are_refused(tmp_path):
    wide = CONFIG.model_copy(
        update={"d_model": 32, "moe": CONFIG.moe.model_copy(update={"d_expert": 32})}
    )
    write_random_model(tmp_path / "plain", wide)
    convert(tmp_path / "plain", tmp_path / "int8", dtype="int8")
    with pytest.raises(ConfigError, match="experts of 8 or 4 bits"):
        load(tmp_path / "int8", expert_sparsity="exact")
    with pytest.raises(ConfigError, match="measured on plain ones"):
        measure_sparsity(load(tmp_path / "int8"), TEXT, "cats", 0.5, 64)
