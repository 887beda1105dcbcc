"""Runs that train routers alone or low-rank updates: what moves, what is kept and exported."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moeyard.errors import CheckpointError, ConfigError
from moeyard.moe.batch import batch_of_rows
from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.checkpoint import StoredTensors
from moeyard.training.checkpoints.export import export
from moeyard.training.parallelize import parallelize
from moeyard.training.read_config import read_run_config
from moeyard.training.setup import build_model
from moeyard.training.trainer import Trainer

from hf_families import save
from kills import digest

CASES = ("qwen3_moe", "deepseek_v3")
"""Grouped-query attention with a dense layer; latent attention and a balancing bias."""
VOCABULARY = 260
LORA = "train.parameters=lora"
TRAINED = {
    "router": ["train.parameters=router"],
    "lora": [LORA, "lora={rank: 3, alpha: 5}"],
    "lora_attention": [LORA, "lora={targets: [attention]}"],
    "lora_experts": [LORA, "lora={targets: [experts]}"],
}
MOVES = {
    "router": (".mlp.gate.",),
    "lora": (".self_attn.", ".mlp.experts."),
    "lora_attention": (".self_attn.",),
    "lora_experts": (".mlp.experts.",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    for case in CASES:
        save(case, folder / case, vocab_size=VOCABULARY)
    return folder


def options(folder: Path, run: Path, *more: str) -> list[str]:
    rate = ["optimizer.lr=0.02", "model={moe: {router: {bias_update_rate: 0.01}}}"]
    if folder.name != "deepseek_v3":
        rate[1] = "model=null"
    return [f"run_dir={run}", f"start_from={folder}", *rate, *more]


def train(config_file, folder: Path, run: Path, *more: str) -> None:
    assert main([str(config_file), *options(folder, run, *more)]) == 0


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("case", "kind"),
    [*((CASES[0], kind) for kind in TRAINED), (CASES[1], "router"), (CASES[1], "lora")],
)
def test_only_what_was_asked_for_moves_and_the_loss_falls(
    folders, config_file, tmp_path, case, kind
):
    train(config_file, folders / case, tmp_path / "run", "train.steps=12", *TRAINED[kind])
    export(tmp_path / "run", tmp_path / "out")
    before, after = tensors_of(folders / case), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    meant = {name for name in before if any(part in name for part in MOVES[kind])}
    meant = {name for name in meant if before[name].ndim > 1 or "correction_bias" in name}
    assert moved <= meant
    # Experts that no token chose have nothing to learn from.
    assert all(".experts." in name for name in meant - moved)
    kinds = {re.sub(r"experts\.\d+", "experts", name) for name in meant}
    assert {re.sub(r"experts\.\d+", "experts", name) for name in moved} == kinds
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_merged_export_has_the_logits_of_the_model_that_trained(
    folders, config_file, tmp_path, case
):
    given = options(folders / case, tmp_path / "run", "train.steps=4", *TRAINED["lora"])
    trainer = Trainer(read_run_config(config_file, given), tmp_path / "run", Mesh())
    (tmp_path / "run").mkdir(exist_ok=True)
    with torch.enable_grad():
        trainer.run()
    export(tmp_path / "run", tmp_path / "out")
    ids = torch.randint(0, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(0))
    decoder = trainer.decoder.eval()
    trained = decoder.logits(decoder(batch_of_rows(ids)).hidden_TD).unflatten(0, ids.shape)
    opened, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (opened.eval()(ids).logits - trained).abs().max() <= 1e-5 * trained.abs().max()
    start = AutoModelForCausalLM.from_pretrained(folders / case).eval()
    assert (start(ids).logits - trained).abs().max() > 1e-2, "updates must not be next to nothing"


@pytest.mark.parametrize(("kind", "precision"), [("router", "bf16"), ("lora", "fp32")])
def test_a_resumed_run_ends_as_the_unbroken_one(folders, config_file, tmp_path, kind, precision):
    more = [
        *TRAINED[kind],
        f"train.precision={precision}",
        "optimizer.warmup_steps=9",
        "train.steps=4",
    ]
    folder = folders / "deepseek_v3"
    train(config_file, folder, tmp_path / "whole", *more)
    train(config_file, folder, tmp_path / "parts", *more, "train.steps=2")
    train(config_file, folder, tmp_path / "parts", *more)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_frozen_weights_have_no_moments_no_masters_and_no_gradients(folders, config_file, tmp_path):
    folder, more = (
        folders / "qwen3_moe",
        [*TRAINED["lora"], "train.precision=bf16", "train.steps=2"],
    )
    train(config_file, folder, tmp_path / "run", *more)
    stored = StoredTensors(tmp_path / "run/checkpoints/step-00000002")
    moments = {key.partition("/")[2] for key in stored if key.startswith("exp_avg/")}
    weights = {key.partition("/")[2] for key in stored if key.startswith("weight/")}
    assert moments == {name for name in weights if "lora" in name} and moments
    for name in weights - moments:
        is_router = ".mlp.gate." in name
        wanted = torch.float32 if is_router else torch.bfloat16
        assert stored.type_and_shape(f"weight/{name}")[0] == wanted, name
    config = read_run_config(config_file, options(folder, tmp_path / "run", *more))
    trainer = Trainer(config, tmp_path / "run", Mesh())
    decoder = build_model(config, trainer._model_config, trainer._data, Mesh())
    objective = trainer.objective
    module, rows = objective.module(decoder), objective.mean_rows
    masters = parallelize(config, decoder, module, Mesh(), rows).masters
    assert masters and all("lora" in name for name in masters)
    trainer._step.run(0, stop_requested=False)
    for name, parameter in trainer.decoder.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        assert hasattr(parameter, "main_grad") == ("lora" in name) and parameter.grad is None


def test_updates_are_drawn_by_name_and_expert_and_begin_as_nothing(folders, config_file, tmp_path):
    def updates(*more):
        given = options(folders / "qwen3_moe", tmp_path / "run", *TRAINED["lora"], *more)
        trainer = Trainer(read_run_config(config_file, given), tmp_path / "run", Mesh())
        return {n: p.detach() for n, p in trainer.decoder.named_parameters() if "lora" in n}

    first, again, other = updates(), updates(), updates("seed=4")
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor)
        if name.endswith("_b"):
            assert float(tensor.abs().max()) == 0
        else:
            bound = tensor.shape[-1] ** -0.5
            assert 0.8 * bound < float(tensor.abs().max()) <= bound
            assert not torch.equal(other[name], tensor)
            assert tensor.ndim == 2 or not torch.equal(tensor[0], tensor[1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.parameters=router", "model.moe.router={kind: hash}"], "has hash routers"),
        (["train.parameters=router", "model.moe=null", "model.d_ff=40"], "has no experts"),
        (["lora={rank: 4}"], "lora is given, but train.parameters is all"),
        ([LORA, "lora.targets=[experts]", "model.moe=null", "model.d_ff=40"], "use .attention."),
        ([LORA, "model.moe=null", "model.d_ff=40"], "has experts, but the model has none"),
        ([LORA, "lora.targets=[]"], "at least 1"),
        ([LORA, "lora.rank=0"], "greater than or equal to 1"),
    ],
)
def test_what_would_train_nothing_gets_one_sentence(config_file, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_run_config(config_file, [f"run_dir={tmp_path}", *overrides])
    config = read_run_config(config_file, [f"run_dir={tmp_path}", LORA])
    assert config.lora.rank == 8 and config.lora.targets == ("attention", "experts")


def test_a_run_goes_on_with_the_parameters_it_began_with(folders, config_file, tmp_path):
    folder = folders / "qwen3_moe"
    train(config_file, folder, tmp_path / "run", "train.steps=2", *TRAINED["lora"])
    given = options(folder, tmp_path / "run", LORA, "lora={rank: 3, alpha: 6}")
    trainer = Trainer(read_run_config(config_file, given), tmp_path / "run", Mesh())
    with pytest.raises(CheckpointError, match="was made with lora = "):
        trainer.run()
