"""A number type may be given by its short or its long name, everywhere."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

import moeyard
from moeyard import dtypes
from moeyard.cli import build_parser
from moeyard.errors import ConfigError
from moeyard.moe.folders.convert import convert

BOTH = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
PAIRS = pytest.mark.parametrize("short, long", BOTH.items(), ids=list(BOTH))


@PAIRS
def test_both_names_and_torchs_own_type_mean_the_same(short, long):
    kind = getattr(torch, long)
    assert {dtypes.short_name(given) for given in (short, long, f"torch.{long}", kind)} == {short}
    assert dtypes.torch_dtype(short) is kind


def test_other_values_are_left_to_their_reader():
    for other in ("int8", "fp16", None, True, 16):
        assert dtypes.short_name(other) is other


@pytest.mark.parametrize("name", ["bf16", "bfloat16", torch.bfloat16], ids=str)
def test_load_takes_both(model_folder, name):
    model = moeyard.load(model_folder, dtype=name)
    assert model.decoder.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_convert_takes_both(tmp_path, model_folder, name):
    convert(model_folder, tmp_path / "out", name)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].dtype == torch.bfloat16


@PAIRS
def test_a_run_takes_both_and_its_folder_has_the_short_one(config_file, short, long):
    from moeyard.training.read_config import read_run_config

    for name in (short, long):
        config = read_run_config(config_file, [f"train.precision={name}"])
        assert config.train.precision == short
        assert yaml.safe_load(config.model_dump_json())["train"]["precision"] == short


def test_a_server_takes_both(model_folder):
    from moeyard.serving.serve_args import ServeArgs

    for name in ("bf16", "bfloat16"):
        assert ServeArgs(model=str(model_folder), dtype=name).dtype == "bf16"


def test_commands_take_both():
    parser = build_parser()
    for name in ("bf16", "bfloat16"):
        assert parser.parse_args(["serve", "model", "--dtype", name]).dtype == "bf16"
        assert parser.parse_args(["convert", "a", "b", "--dtype", name]).dtype == "bf16"


def test_an_unknown_name_gets_a_sentence_with_the_known_ones(tmp_path, model_folder):
    known = r"use one of fp32 \(float32\), bf16 \(bfloat16\)"
    with pytest.raises(ConfigError, match=f"dtype is 'fp16'; {known}"):
        moeyard.load(model_folder, dtype="fp16")
    with pytest.raises(ConfigError, match=f"dtype is 'fp16'; {known}, int8, int4"):
        convert(model_folder, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()
