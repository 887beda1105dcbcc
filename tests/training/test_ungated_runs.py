"""Runs of experts without a gate: low-rank updates in checkpoints, exports and adapter folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.errors import ModelFileError
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.export import export
from moeyard.training.checkpoints.export_adapter import export_adapter

from small_model import CONFIG, write_decoder


def test_an_adapter_on_its_base_is_the_merged_export(tmp_path, config_file):
    moe = MoEConfig(num_experts=4, d_expert=20, activation="relu", router=moeyard.TopK(k=2))
    decoder = Decoder(CONFIG.model_copy(update={"moe": moe}))
    initialize(decoder, 5)
    write_decoder(tmp_path / "base", decoder, eos_id=256)
    options = [f"run_dir={tmp_path}/run", f"start_from={tmp_path}/base", "model=null"]
    options += ["optimizer.lr=0.05", "train.steps=3", "train.parameters=lora"]
    assert main([str(config_file), *options, "lora={rank: 3, alpha: 5}"]) == 0
    export(tmp_path / "run", tmp_path / "merged")
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.mlp.experts"
    assert list(tensors[f"{path}.3.up_proj.lora_B.weight"].shape) == [20, 3]
    assert list(tensors[f"{path}.3.down_proj.lora_A.weight"].shape) == [3, 20]
    ids = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(0))
    model = moeyard.load(tmp_path / "base", adapters={"tuned": tmp_path / "adapter"})
    merged = moeyard.load(tmp_path / "merged")
    assert (merged(ids) - model(ids)).abs().max() > 0.1, "the run has changed next to nothing"
    torch.testing.assert_close(model(ids, adapter="tuned"), merged(ids), rtol=1e-4, atol=1e-4)

    config_path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(config_path.read_text())
    assert {"up_proj", "down_proj"} <= set(config["target_modules"])
    fused = {n.replace(".3.up_proj", ""): t for n, t in tensors.items() if ".3.up_proj" in n}

    save_file(fused, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelFileError, match="have no gate; name up_proj and down_proj"):
        moeyard.load(tmp_path / "base", adapters={"fused": tmp_path / "adapter"})
