"""A trained model rewired to choose a layer ahead: it trains, exports and is served exactly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.serving.loading import open_model
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.export import export

from hf_families import save

CONFIG = Path(__file__).parent.parent.parent / "configs/train/pregate.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "m"
    save("qwen3_moe", path, vocab_size=260)
    return path


@pytest.mark.parametrize("parameters", ["router", "all"])
def test_a_rewired_model_trains_and_its_experts_are_read_ahead(
    folder, text_file, tmp_path, parameters
):
    run = tmp_path / "run"
    options = [f"run_dir={run}", f"start_from={folder}", f"data.source={text_file}"]
    options += ["data.tokenizer=bytes"]
    options += ["train.steps=20", "train.log_every=1", "train.sequence_length=32"]
    options += ["optimizer.lr=0.02", "optimizer.warmup_steps=1", "train.eval_sequences=8"]
    assert main([str(CONFIG), *options, f"train.parameters={parameters}"]) == 0
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
    assert sum(losses[-5:]) / 5 < 0.98 * losses[0]

    export(run, tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["model_type"] == "moeyard" and "lookahead" in values["why_moeyard"]
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved
    assert parameters == "all" or all(".mlp.gate." in name for name in moved)

    resident = moeyard.load(tmp_path / "out")
    assert resident.config.moe.router.lookahead == "previous_block"
    prompt = torch.randint(0, 257, (1, 9), generator=torch.Generator().manual_seed(7))
    expected = resident.generate(prompt, 24, temperature=0)
    offloaded, store = open_model(tmp_path / "out", expert_memory="50%")
    assert torch.equal(offloaded.generate(prompt, 24, temperature=0), expected)
    assert torch.equal(offloaded(expected), resident(expected))
    ahead = {layer: t.prefetch_issued for layer, t in store.statistics.layers.items()}
    assert ahead[2] > 0, "the second MoE layer's experts are known a layer ahead"
    assert ahead.get(0, 0) == 0


def test_weights_start_as_they_were(folder, text_file, tmp_path):
    options = [f"run_dir={tmp_path}/run", f"start_from={folder}", f"data.source={text_file}"]
    options += ["data.tokenizer=bytes"]
    options += ["train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0"]
    assert main([str(CONFIG), *options, "train.eval_sequences=4"]) == 0
    export(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
