"""Frozen experts read from their folder in training: the same numbers at any share of memory."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.errors import CheckpointError, ConfigError
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.convert import convert
from moeyard.moe.routers.topk import TopK
from moeyard.parallel.mesh import Mesh
from moeyard.serving.frozen_experts import open_frozen
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.checkpoint import StoredTensors
from moeyard.training.checkpoints.export import export
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

import small_model
from kills import digest
from launch import torchrun

CONFIG = small_model.CONFIG.model_copy(
    update={"d_model": 64, "moe": MoEConfig(num_experts=8, d_expert=32, router=TopK(k=2))}
)
"""16 experts, of widths that 4 bits can have."""
LORA = ["train.parameters=lora", "lora={rank: 2, alpha: 3}"]
ROUTER = ["train.parameters=router"]
KINDS = {"lora": LORA, "router": ROUTER}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    small_model.write_random_model(folder / "fp32", CONFIG)
    convert(folder / "fp32", folder / "int4", "int4")
    convert(folder / "int4", folder / "widened")
    return folder


def options(folder, run, *more):
    rate = ["optimizer.lr=0.02", "model=null", "data.tokenizer=null", "train.steps=3"]
    return [f"run_dir={run}", f"start_from={folder}", *rate, *more]


def share(percent):
    return [] if percent is None else [f"train.expert_memory={percent}%"]


def train(config_file, folder, run, *more):
    assert main([str(config_file), *options(folder, run, *more)]) == 0


def trained(config_file, folder, run, *more):
    """Return losses of three steps, gradients of the last one, when no B is 0, and weights."""
    config = read_run_config(config_file, options(folder, run, *more))
    trainer = Trainer(config, run, Mesh(), open_source=open_frozen)
    losses = [trainer._step.run(step, stop_requested=False).loss for step in range(3)]
    parameters = {n: p for n, p in trainer.decoder.named_parameters() if p.requires_grad}
    found = {f"grad/{n}": p.main_grad.clone() for n, p in parameters.items()}
    if trainer._source is not None:
        trainer._source.close()
    found |= {n: p.detach().clone() for n, p in parameters.items()}
    return found | {"losses": torch.tensor(losses, dtype=torch.float64)}


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("lora", "bf16"), ("router", "fp32"), slow("lora", "fp32"), slow("router", "bf16")],
)
def test_no_share_of_memory_changes_a_bit(folders, config_file, tmp_path, kind, precision):
    def run(percent):
        more = [*KINDS[kind], f"train.precision={precision}", *share(percent)]
        return trained(config_file, folders / "fp32", tmp_path / "run", *more)

    resident, whole = run(None), run(100)
    assert whole.keys() == resident.keys() and any("lora" in n for n in whole) == (kind == "lora")
    for name, right in resident.items():
        if kind == "lora":
            assert torch.equal(whole[name], right), name
        elif precision == "fp32" or name == "losses":  # parameters run on another kernel then
            tolerance = 1e-4 if precision == "fp32" else 1e-2
            assert (whole[name] - right).abs().max() <= tolerance * right.abs().max(), name
    for percent in (50, 25):
        found = run(percent)
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert all(bool(tensor.any()) for name, tensor in whole.items() if "grad" in name)


def test_quantized_experts_train_as_the_folder_they_stand_for(folders, config_file, tmp_path):
    def run(name, percent):
        return trained(config_file, folders / name, tmp_path / "run", *LORA, *share(percent))

    widened = run("widened", None)
    for percent in (100, 25):
        found = run("int4", percent)
        assert found.keys() == widened.keys()
        assert all(torch.equal(found[name], widened[name]) for name in found)
    original = run("fp32", None)["losses"]
    assert not torch.equal(original, widened["losses"]), "rounding must make a difference"


@pytest.mark.slow
def test_recomputing_pre_activations_changes_nothing(folders, config_file, tmp_path):
    def run(*more):
        return trained(config_file, folders / "fp32", tmp_path / "run", *LORA, *share(25), *more)

    kept = run()
    for recompute in ("experts", "true"):
        found = run(f"train.recompute={recompute}")
        assert all(torch.equal(found[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", ["lora", slow("router")])
def test_a_checkpoint_holds_what_trains_and_goes_on_with_another_budget(
    folders, config_file, tmp_path, kind
):
    more = [*KINDS[kind], "optimizer.warmup_steps=9"]
    train(config_file, folders / "fp32", tmp_path / "whole", *more, *share(25))
    train(config_file, folders / "fp32", tmp_path / "parts", *more, *share(25), "train.steps=1")
    train(config_file, folders / "fp32", tmp_path / "parts", *more, *share(60))
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    stored = StoredTensors(tmp_path / "whole/checkpoints/step-00000003")
    weights = {key for key in stored if key.startswith("weight/")}
    part = "lora" if kind == "lora" else ".mlp.gate."
    assert weights and all(part in key for key in weights)


@pytest.mark.parametrize("precision", ["bf16", slow("fp32")])
def test_an_export_is_that_of_resident_training(folders, config_file, tmp_path, precision):
    for name, percent in (("resident", None), ("streamed", 25)):
        more = [*LORA, f"train.precision={precision}", *share(percent)]
        train(config_file, folders / "fp32", tmp_path / name, *more)
        export(tmp_path / name, tmp_path / f"{name}-out")
    one, other = (
        load_file(tmp_path / f"{name}-out/model.safetensors") for name in ("resident", "streamed")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_two_ranks_have_the_losses_of_one_and_of_resident_ranks(
    folders, config_file, tmp_path, dense
):
    def losses(ranks, name, percent):
        more = [*LORA, f"parallel.dense={dense}", "train.log_every=1", *share(percent)]
        given = options(folders / "fp32", tmp_path / name, *more)
        torchrun(ranks, "-m", "moeyard.training", str(config_file), *given)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)

    found = losses(2, "streamed", 25)
    assert torch.equal(found, losses(2, "resident", None))
    torch.testing.assert_close(found, losses(1, "one", 25), rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_merged_export_of_int4_experts_has_the_logits_of_the_trained_model(
    folders, config_file, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    given = options(folders / "int4", run, *LORA, *share(25))
    trainer = Trainer(read_run_config(config_file, given), run, Mesh(), open_source=open_frozen)
    with torch.enable_grad():
        trainer.run()
    export(run, tmp_path / "out")
    source = trainer._source = open_frozen(str(folders / "int4"), torch.float32, "25%")
    for _, layer in trainer.decoder.moe_layers():
        layer.experts._source = source  # the run closed its own
    ids = torch.randint(0, 257, (2, 23), generator=torch.Generator().manual_seed(0))
    decoder = trainer.decoder.eval()
    wanted = decoder.logits(decoder(batch_of_rows(ids)).hidden_TD)
    source.close()
    for budget in (None, "30%"):
        found = moeyard.load(tmp_path / "out", expert_memory=budget).decoder
        logits = found.logits(found(batch_of_rows(ids)).hidden_TD)
        assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    start = moeyard.load(folders / "int4").decoder
    assert (start.logits(start(batch_of_rows(ids)).hidden_TD) - wanted).abs().max() > 1e-2


def test_an_export_needs_the_folder_as_it_was(folders, config_file, tmp_path):
    folder = tmp_path / "model"
    convert(folders / "fp32", folder)
    bytes_too = [*LORA, *share(25), "data.tokenizer=bytes"]
    train(config_file, folder, tmp_path / "run", *bytes_too)
    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-5] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(CheckpointError, match="has other weights than"):
        export(tmp_path / "run", tmp_path / "out")
    given = options(folder, tmp_path / "run", *bytes_too)
    trainer = Trainer(
        read_run_config(config_file, given), tmp_path / "run", Mesh(), open_source=open_frozen
    )
    with pytest.raises(CheckpointError, match="was made with frozen = "):
        trainer.run()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"has no frozen weights, and .*/model, where"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["train.parameters=all"], "only frozen experts can be read .* or leave expert_memory out"),
        ([*LORA, "parallel.ep=2"], "parallel.ep is 2.* set ep to 1"),
        ([*ROUTER, "parallel.expert_tp=2"], "expert_tp is 2.* set expert_tp to 1"),
        ([*LORA, "parallel.dense=deepspeed"], "dense is deepspeed.* use ddp or fsdp"),
        (
            [*LORA, "parallel.pp=3", "parallel.pp_schedule=gpipe"],
            "train.parameters is lora.* parallel.pp to 1",
        ),
        ([*LORA, "train.precision=fp64"], "precision is fp64; use fp32 or bf16"),
        ([*LORA, "train.expert_memory=soon"], "train.expert_memory is 'soon'; write a size"),
        ([*LORA, "train.expert_memory=auto"], "write a size like 2GiB or a share like 25%\\."),
        ([*LORA, "train.expert_memory=0%"], "above 0%"),
        ([*LORA, "train.expert_memory=9kB"], "9000 bytes, but one expert takes 24576"),
    ],
)
def test_what_cannot_be_read_gets_one_sentence(folders, config_file, tmp_path, more, message):
    given = [*options(folders / "fp32", tmp_path), *share(25), *more]
    with pytest.raises(ConfigError, match=message):
        config = read_run_config(config_file, given)
        Trainer(config, tmp_path, Mesh(), open_source=open_frozen)


def test_without_experts_or_a_folder_there_is_nothing_to_read(config_file, tmp_path):
    given = [f"run_dir={tmp_path}", *share(25), "train.parameters=lora", "lora.targets=[attention]"]
    with pytest.raises(ConfigError, match="start_from names no folder"):
        read_run_config(config_file, given)
    with pytest.raises(ConfigError, match="but the model has no experts; leave it out"):
        read_run_config(config_file, [*given, "model.moe=null", "model.d_ff=40"])
