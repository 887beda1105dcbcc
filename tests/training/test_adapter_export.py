"""LoRA runs as folders of peft: served unmerged, they compute what the merged export computes."""

import json

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.cli import main as command
from moeyard.errors import ConfigError, ModelFileError
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.export import export
from moeyard.training.checkpoints.export_adapter import export_adapter

from hf_families import save

VOCABULARY = 260


@pytest.fixture(scope="module")
def run(tmp_path_factory, config_file):
    """A finished run of a DeepSeek-like model, next to the folder that it started from."""
    root = tmp_path_factory.mktemp("lora")
    save("deepseek_v3", root / "base", vocab_size=VOCABULARY)
    given = ["optimizer.lr=0.05", "train.steps=4", "train.parameters=lora"]
    given += ["model={moe: {router: {bias_update_rate: 0.0}}}", "lora={rank: 3, alpha: 5}"]
    options = [f"run_dir={root}/run", f"start_from={root}/base", *given]
    assert main([str(config_file), *options]) == 0
    return root


def test_the_adapter_on_the_base_is_the_merged_export(run, tmp_path):
    export(run / "run", tmp_path / "merged")
    assert command(["export", str(run / "run"), str(tmp_path / "adapter"), "--adapter"]) == 0
    ids = torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(0))
    model = moeyard.load(run / "base", adapters={"tuned": tmp_path / "adapter"})
    merged = moeyard.load(tmp_path / "merged")
    assert (merged(ids) - model(ids)).abs().max() > 0.1, "the run has changed next to nothing"
    torch.testing.assert_close(model(ids, adapter="tuned"), merged(ids), rtol=1e-4, atol=1e-4)
    rows = model.generate(ids, 6, temperature=0, adapter="tuned")
    assert rows.equal(merged.generate(ids, 6, temperature=0))


def test_the_folder_says_what_peft_asks_for(run, tmp_path):
    export_adapter(run / "run", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    assert config["rank_pattern"] == {"mlp.experts.gate_up_proj": 6}
    assert config["alpha_pattern"] == {"mlp.experts.gate_up_proj": 10}
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    path = "base_model.model.model.layers.1.mlp.experts"
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes[f"{path}.base_layer.lora_A.weight"] == [8 * 6, 40]
    assert shapes[f"{path}.base_layer.lora_B.weight"] == [48, 8 * 6]
    assert shapes[f"{path}.lora_A.weight"] == [8 * 3, 24]
    assert shapes[f"{path}.lora_B.weight"] == [40, 8 * 3]
    # Gate rows of B do not read up's A, nor up rows gate's: rank index first, expert innermost.
    b_H6E = tensors[f"{path}.base_layer.lora_B.weight"].unflatten(1, (6, 8))
    assert not b_H6E[:24, 3:].any() and not b_H6E[24:, :3].any()
    assert b_H6E[:24, :3].any() and b_H6E[24:, 3:].any()


def test_a_folder_that_exists_and_a_run_without_an_adapter_are_refused(run, tmp_path, config_file):
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelFileError, match="exists already"):
        export_adapter(run / "run", tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []
    assert main([str(config_file), f"run_dir={tmp_path}/plain", "train.steps=1"]) == 0
    with pytest.raises(ConfigError, match="parameters all, so it has no adapter"):
        export_adapter(tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
