"""Folders whose matrices have several formats: which one has which, there and back."""

import copy
import json

import pytest
import torch

import moeyard
from moeyard.errors import ModelFileError
from moeyard.moe.experts.mixed import MixedExperts
from moeyard.moe.folders.compressed_tensors import PackedFormat
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.packed_schemes import PackedSchemes, check_targets
from moeyard.moe.folders.quantized_config import read_quantization_config

from hf_families import save

FAMILIES = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}
WIDE, NARROW = PackedFormat(8, None), PackedFormat(4, 32)


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """A plain folder, its copies of one width, and a mixed one, with the bits of each expert."""
    path = tmp_path_factory.mktemp(request.param)
    save(
        request.param, path / "plain", hidden_size=64, head_dim=12, **{FAMILIES[request.param]: 96}
    )
    config = ModelFolder(path / "plain").config
    keys = [(n, e) for n in config.moe_layers for e in range(config.moe.num_experts)]
    bits_of = {(layer, e): 8 if (layer + e) % 3 else 4 for layer, e in keys}
    convert(path / "plain", path / "mixed", bits_of=bits_of)
    for dtype in ("int8", "int4"):
        convert(path / "plain", path / dtype, dtype)
    return path, bits_of


def matrices_of(model, layer, expert):
    """Return an expert's matrices, whatever module holds it."""
    experts = dict(model.decoder.moe_layers())[layer].experts
    weights = experts.weights
    if isinstance(experts, MixedExperts):
        weights = weights[experts.kind_of_E[expert]]
    return weights.matrices(weights.slot(expert), torch.float32)


def test_each_expert_has_the_bits_of_the_folder_of_its_width(folders):
    path, bits_of = folders
    mixed = moeyard.load(path / "mixed")
    alike = {bits: moeyard.load(path / f"int{bits}") for bits in (8, 4)}
    for (layer, expert), bits in bits_of.items():
        found = matrices_of(mixed, layer, expert)
        for one, other in zip(found, matrices_of(alike[bits], layer, expert), strict=True):
            assert torch.equal(one, other)
    shown = repr(mixed.decoder)
    assert "4 int8, 2 int4 experts" in shown


@torch.no_grad()
def test_rows_of_an_expert_are_those_of_the_folder_of_its_width(folders):
    path, bits_of = folders
    mixed, alike = moeyard.load(path / "mixed"), {}
    for bits in (8, 4):
        alike[bits] = dict(moeyard.load(path / f"int{bits}").decoder.moe_layers())
    for layer, module in mixed.decoder.moe_layers():
        x_ND = torch.randn(5, 64, generator=torch.Generator().manual_seed(layer))
        for expert in range(module.num_experts):
            rows = x_ND, torch.full((5, 1), expert), torch.ones(5, 1)
            other = alike[bits_of[layer, expert]][layer].experts
            assert torch.equal(module.experts(*rows), other(*rows))


def test_a_mixed_folder_can_be_widened_and_says_what_it_is(folders, tmp_path):
    path, bits_of = folders
    convert(path / "mixed", tmp_path / "wide", "fp32")
    wide, mixed = ModelFolder(tmp_path / "wide"), ModelFolder(path / "mixed")
    assert mixed.check() is None and wide.formats.kinds == (None,)
    assert mixed.formats.kinds == (WIDE, NARROW)
    # transformers has one scheme for the experts of a layer, and would not say that it is wrong.
    assert mixed.values["model_type"] == "moeyard"
    assert "differ in width" in mixed.values["why_moeyard"]
    assert wide.values["model_type"] != "moeyard"
    for (layer, expert), bits in bits_of.items():
        assert mixed.formats.kinds[mixed.formats.kind((layer, expert))].bits == bits
    with pytest.raises(ModelFileError, match="has experts of several widths"):
        _ = mixed.packed


def test_the_package_finds_the_same_scheme_for_each_module(folders):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    path, bits_of = folders
    files = ModelFolder(path / "mixed")
    config = QuantizationConfig.model_validate(files.values["quantization_config"])
    linear = torch.nn.Linear(1, 1)
    for (layer, expert), bits in bits_of.items():
        for part in ("gate", "up", "down"):
            name = files.family.experts.name(layer, expert, part).removesuffix(".weight")
            fits = [
                group.weights.num_bits
                for group in config.config_groups.values()
                if is_match(name, linear, group.targets, config.ignore)
            ]
            assert fits == [bits]
    assert len(config.ignore) > 0
    for name in config.ignore:
        for group in config.config_groups.values():
            assert not is_match(name, linear, group.targets)


def test_names_count_before_patterns_and_patterns_before_classes():
    schemes = PackedSchemes(
        (
            (PackedFormat(8, None), ("Linear", "a.b.experts.3.up_proj")),
            (PackedFormat(4, 64), (r"re:.*experts\.\d+\.\w+$",)),
        )
    )
    assert schemes.of("a.b.experts.3.up_proj.weight").bits == 8
    assert schemes.of("a.b.experts.4.up_proj.weight").bits == 4
    assert schemes.of("a.b.q_proj.weight").bits == 8
    alone = PackedSchemes(schemes.schemes[1:])
    with pytest.raises(ModelFileError, match="without a target for lm_head, whose"):
        alone.of("lm_head.weight")


@pytest.mark.parametrize(
    "targets", [None, [], [3], ["re:(a*)*b"], ["re:(a|a)+b"], ["re:.*.*.*.*.*b"], ["re:("]]
)
def test_targets_that_cannot_be_matched_safely_are_refused(targets):
    with pytest.raises(ModelFileError) as caught:
        check_targets("config_groups.a.targets", targets)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_an_expert_of_two_formats_is_refused(folders, tmp_path):
    path, _ = folders
    values = json.loads((path / "mixed" / "config.json").read_text())
    groups = values["quantization_config"]["config_groups"]
    for group in groups.values():
        narrow = group["weights"]["num_bits"] == 4
        group["targets"] = [r"re:.*(up_proj|w3)$"] if narrow else ["Linear"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelFileError, match="expert 0 of layer 0 has matrices of 2 kinds"):
        ModelFolder(tmp_path)


def test_groups_of_one_format_are_read_as_one():
    config = copy.deepcopy(CONFIG)
    assert read_quantization_config(config) == PackedFormat(4, 64)


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"a": GROUP, "b": {**GROUP, "targets": ["re:.*experts.*"]}},
}
