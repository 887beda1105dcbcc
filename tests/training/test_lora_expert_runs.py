"""Runs that train LoRA experts: what moves, resuming, the adapter folder, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.cli import main as command
from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of_rows
from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.export import export, newest
from moeyard.training.checkpoints.export_adapter import export_adapter
from moeyard.training.checkpoints.files import read_state, write_state
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

from hf_families import save
from kills import digest

VOCABULARY = 260
LORA = ["train.parameters=lora", "optimizer.lr=0.02", "model=null"]
EXPERTS = "lora={rank: 3, alpha: 5, targets: [attention, mlp], experts: 4}"
PLAIN = "lora={rank: 3, alpha: 5, targets: [attention, mlp]}"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "dense"
    save("llama", folder, vocab_size=VOCABULARY)
    return folder


def given(dense, run_dir, *more: str) -> list[str]:
    return [f"run_dir={run_dir}", f"start_from={dense}", *LORA, *more]


@pytest.fixture(scope="module", params=["none", "probability"])
def run(request, dense, config_file, tmp_path_factory):
    """A finished run of 12 steps, and its trainer."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    options = given(dense, run_dir, EXPERTS, f"lora.weighting={request.param}", "train.steps=12")
    run_dir.mkdir()
    trainer = Trainer(read_run_config(config_file, options), run_dir, Mesh())
    trainer.run()
    return run_dir, trainer


def test_the_loss_falls_and_metrics_show_the_load_of_every_layer(run):
    run_dir, trainer = run
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records]
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    for record in records:
        assert record["moe_layers"] == [0, 1, 2] and len(record["load"]) == 3
        assert [len(layer) for layer in record["expert_tokens"]] == [4, 4, 4]
        assert [sum(layer) for layer in record["expert_tokens"]] == [8 * 32] * 3
        assert all(layer["dropped"] == 0 for layer in record["load"])
        assert 1 <= record["balance"] < 4
    for name, parameter in trainer.decoder.named_parameters():
        assert parameter.requires_grad == ("lora" in name or ".mlp.gate." in name)
    start = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[0])
    one_expert = 3 * (40 + 56) * 3  # rank 3, three projections
    assert start["parameters"] - start["active_parameters"] == 3 * 3 * one_expert


@torch.no_grad()
def test_the_exported_adapter_has_the_logits_of_the_model_that_trained(run, dense, tmp_path):
    run_dir, trainer = run
    out = tmp_path / "adapter"
    assert command(["export", str(run_dir), str(out), "--adapter"]) == 0
    ids = torch.randint(0, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(0))
    decoder = trainer.decoder.eval()
    trained = decoder.logits(decoder(batch_of_rows(ids)).hidden_TD).unflatten(0, ids.shape)
    model = moeyard.load(dense, adapters={"tuned": out})
    assert (model(ids) - trained).abs().max() > 1e-2
    torch.testing.assert_close(model(ids, adapter="tuned"), trained, rtol=1e-4, atol=1e-4)
    tensors = load_file(out / "lora_experts.safetensors")
    state = decoder.state_dict()
    gate_up = state["layers.1.mlp.lora_experts.fc1_lora_a"]
    assert tensors["model.layers.1.mlp.up_proj.lora_A"].equal(gate_up[:, 3:])
    assert tensors["model.layers.1.mlp.router.bias"].equal(state["layers.1.mlp.gate.bias"])
    assert len(tensors) == 3 * (2 + 6 + 2 * 4)


def test_no_other_program_takes_the_folder_for_a_plain_lora(run, tmp_path):
    export_adapter(run[0], tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "lora_experts.safetensors"}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "MOEYARD_LORA_EXPERTS" and not {"r", "lora_alpha"} & set(config)
    peft = pytest.importorskip("peft")
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))


def test_they_are_not_merged_into_weights(run, tmp_path):
    with pytest.raises(ConfigError, match=r"has 4 LoRA experts .* export it with --adapter"):
        export(run[0], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_checkpoints_from_before_lora_experts_are_read(run, tmp_path):
    state = read_state(newest(run[0]))
    step, before = state.pop("step"), {"rank": 3, "alpha": 5.0, "targets": ["attention"]}
    write_state(tmp_path, step, state | {"lora": before})
    added = {"experts": 0, "weighting": "none", "balance_loss": 0.01}
    assert read_state(tmp_path)["lora"] == before | added


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_resumed_run_ends_as_the_unbroken_one(dense, config_file, tmp_path, precision):
    more = [EXPERTS, f"train.precision={precision}", "optimizer.warmup_steps=9", "train.steps=4"]
    for name, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        options = given(dense, tmp_path / name, *more, f"train.steps={steps}")
        assert main([str(config_file), *options]) == 0
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_plain_updates_of_dense_mlps_are_merged_and_exported_for_peft(dense, config_file, tmp_path):
    assert main([str(config_file), *given(dense, tmp_path / "run", PLAIN, "train.steps=4")]) == 0
    export(tmp_path / "run", tmp_path / "merged")
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert {"q_proj", "layers.0.mlp.gate_proj"} <= set(config["target_modules"])
    assert config["target_parameters"] is None
    ids = torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(0))
    model = moeyard.load(dense, adapters={"tuned": tmp_path / "adapter"})
    merged = moeyard.load(tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (dense, tmp_path / "merged"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert sum(".mlp." in name for name in moved) == 9 and sum("attn" in n for n in moved) == 12
    torch.testing.assert_close(model(ids, adapter="tuned"), merged(ids), rtol=1e-4, atol=1e-4)


DENSE = ["model.moe=null", "model.d_ff=40", "train.parameters=lora"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*DENSE, "lora={targets: [mlp], experts: 1}"], "is 1, which leaves nothing to choose"),
        ([*DENSE, "lora={targets: [mlp], experts: -1}"], "greater than or equal to 0"),
        ([*DENSE, "lora={targets: [attention], experts: 4}"], "no mlp to give them to; add mlp"),
        ([*DENSE, "lora={targets: [mlp], experts: 4, weighting: x}"], "'none' or 'probability'"),
        ([*DENSE, "lora={targets: [mlp], balance_loss: -1}"], "greater than or equal to 0"),
        ([DENSE[2], "lora={targets: [mlp]}"], "all layers of the model are MoE layers"),
        (
            [
                DENSE[2],
                "model.dense_layers=[0]",
                "model.d_ff=40",
                "lora={targets: [mlp], experts: 2}",
            ],
            "LoRA experts are for models without",
        ),
        ([*DENSE, "lora={targets: [mlp], experts: 2}", "parallel.ep=2"], "model has no experts"),
    ],
)
def test_what_cannot_be_gets_one_sentence(config_file, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_run_config(config_file, [f"run_dir={tmp_path}", *overrides])
    assert "\n" not in str(caught.value)
