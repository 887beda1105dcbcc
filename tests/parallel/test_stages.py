"""Layers split into stages: what is refused, and that stages change no number.

test_equivalence.py runs the variants of a model in stages. The tests here are about what crosses
the borders between them.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.stage_rows import StageRows, carries_gate_rows, types_between
from moeyard.parallel.mesh import Mesh, check_expert_parallel
from moeyard.training.checkpoints.checkpoint import StoredTensors
from moeyard.training.checkpoints.export import export
from moeyard.training.formats.text import TextsConfig
from moeyard.training.read_config import read_run_config
from moeyard.training.stages_check import problem_with_stages

from equivalence import EXACT, WORKER, differences, gathered_from
from kills import Launch, wait_until
from launch import moeyard_train, run, torchrun, training

IN_TWO = "parallel.pp=2 train.accumulation=2"
REFUSED = {
    "layers": ("model.num_layers=3 parallel.pp=2", "pp is 2, which does not divide model.num_la"),
    "few_micro_batches": ("parallel.pp=2", "needs a micro-batch for each stage; raise train.accu"),
    "no_stages": ("parallel.pp_schedule=gpipe", "pp_schedule is gpipe, but parallel.pp is 1"),
    "pooled": (f"{IN_TWO} model.moe.router.balance_over=model", "set balance_over to layer"),
    "fsdp": (f"{IN_TWO} parallel.dense=fsdp", "dense is fsdp, which does not know stages"),
    "copies": (f"{IN_TWO} parallel.ep=2 parallel.copies={{}}", "copies is given, which does not"),
    "auto": (f"{IN_TWO} parallel.ep=2 parallel.chunks=auto", "chunks is auto, which does not know"),
    "slices": (f"{IN_TWO} parallel.ep=2 parallel.gradient_slices=auto", "gradient_slices is auto"),
    "lora": (f"{IN_TWO} train.parameters=lora", "train.parameters is lora, which does not know"),
    "chat": (f"{IN_TWO} data.format=chat", "data.format is chat, which does not know stages"),
    "routes": (f"{IN_TWO} monitor.routes={{}}", "monitor.routes is given, which does not know"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_stages_is_refused_in_a_sentence(config_file, name):
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as raised:
        read_run_config(config_file, overrides.split())
    assert "\n" not in str(raised.value)


def test_stages_ask_for_whole_windows_whatever_the_format_is_called(config_file):
    class OwnTexts(TextsConfig):
        format: Literal["own"] = "own"
        has_whole_windows: ClassVar[bool] = True

    config = read_run_config(config_file, IN_TWO.split())
    assert problem_with_stages(config.model_copy(update={"data": OwnTexts()})) is None


def test_ranks_that_do_not_split_into_stages_are_refused():
    with pytest.raises(ConfigError, match=r"pp is 2, which does not divide the 3 rank\(s\); start"):
        check_expert_parallel(1, 3, 8, pp_size=2)
    message = r"ep is 4, which does not divide the 2 rank\(s\) of each of 2 stages; start a multip"
    with pytest.raises(ConfigError, match=message):
        check_expert_parallel(4, 4, 8, pp_size=2)


def test_a_rank_of_the_mesh_has_neighbouring_layers_and_a_share_of_its_stage():
    mesh = Mesh(rank=5, world_size=8, pp_rank=1, pp_size=2, ep_rank=1, ep_size=2)
    assert (mesh.dp_size, mesh.dp_rank, mesh.is_last_stage) == (4, 1, True)
    assert mesh.local_layers(6) == range(3, 6) and mesh.local_experts(8) == range(4, 8)


MODELS = {
    "plain": [],
    "pregated": ["model.moe.router.lookahead=previous_block"],
    "pregated_past_dense": [
        "model.moe.router.lookahead=previous_block",
        "model.dense_layers=[1,2]",
        "model.d_ff=24",
    ],
    "tied": ["model.tie_embeddings=true", "model.moe.router.lookahead=attention_input"],
    "hashed": ["model.moe.router={kind: hash, k: 2}", "model.moe.d_shared=8"],
    "robust_past_dense": [
        "model.moe.block={kind: robust}",
        "model.moe.router.lookahead=previous_block",
        "model.dense_layers=[1,2]",
        "model.d_ff=24",
    ],
    "adam_after_dense": [
        "model.moe.block={kind: adam, adam_layers: 2}",
        "model.dense_layers=[0]",
        "model.d_ff=24",
    ],
}


def built(config, stage: range | None = None) -> Decoder:
    model = config.model.model_copy(update={"vocab_size": 64})
    decoder = Decoder(model, backend="reference", recompute=config.train.recompute, stage=stage)
    initialize(decoder, config.seed)
    return decoder.double().train()


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_stages_one_after_the_other_are_the_whole_decoder(config_file, name, sizes):
    """Rows, choices and all gradients, with names of parameters that do not overlap."""
    options = ["model.num_layers=4", "train.recompute=true", *MODELS[name]]
    config = read_run_config(config_file, options)
    whole = built(config)
    stops = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    stages = [built(config, range(e - n, e)) for e, n in zip(stops, sizes, strict=True)]
    batch = batch_of_rows(torch.arange(24).view(2, 12) * 5 % 64)
    expected = whole(batch)
    before, routings = None, []
    for stage in stages:
        output = stage(batch, before)
        routings += output.routings
        stop = stage.stage.stop
        if stop < whole.config.num_layers:
            passed = output.for_next_stage().tensors()
            assert [rows.dtype for rows in passed] == types_between(
                whole.config, stop, torch.float64
            )
            before = StageRows.of(passed, whole.config, stop)
        assert (output.gate_TD is not None) == carries_gate_rows(whole.config, stop)
    assert torch.equal(output.hidden_TD, expected.hidden_TD)
    for found, right in zip(routings, expected.routings, strict=True):
        assert torch.equal(found.experts_TK, right.experts_TK)
    stages[-1].logits(output.hidden_TD).square().sum().backward()
    whole.logits(expected.hidden_TD).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    found = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            found[name] = found[name] + parameter.grad if name in found else parameter.grad
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)


# Slow: four processes


DENSE_BETWEEN = ["model.dense_layers=[1,2]", "model.d_ff=40"]
CROSSING = {
    "past_dense": ["model.moe.router.lookahead=previous_block", *DENSE_BETWEEN],
    "dense_first": ["model.dense_layers=[0]", "model.d_ff=40", "model.moe.d_shared=8"],
    "hash_recomputed": ["model.moe.router={kind: hash, k: 2}", "train.recompute=true"],
    "pregated_recomputed": [
        "model.moe.router.lookahead=previous_block",
        "train.recompute=true",
        "train.accumulation=8",
    ],
    "packed": ["train.packing=documents", "train.recompute=experts"],
    "bias": [
        "model.moe.router={kind: topk, k: 2, score: sigmoid, bias_update_rate: 0.01, "
        "sequence_balance_loss: 0.1}",
    ],
    "noisy": [  # its other losses are rounded to fixed point on each rank
        "model.moe.router={kind: noisy, k: 2, importance_loss: 0, load_loss: 0, balance_loss: 0.1}",
        "train.recompute=true",
    ],
    "tied": ["model.tie_embeddings=true"],
    "relu": ["model.moe.router={kind: relu}"],
    "robust": [
        "model.moe.block={kind: robust}",
        "model.moe.router.lookahead=previous_block",
        "train.recompute=true",
    ],
    "adam": ["model.moe.block={kind: adam, adam_layers: 2, epsilon: 1.0e-4}", *DENSE_BETWEEN],
}
SPLITS = {
    "pp2-ep2": ["parallel.pp=2", "parallel.ep=2"],
    "pp2-tp2": ["parallel.pp=2", "parallel.expert_tp=2"],
    "pp2-chunks": ["parallel.pp=2", "parallel.ep=2", "parallel.chunks=2"],
    "pp2-gpipe": ["parallel.pp=2", "parallel.ep=2", "parallel.pp_schedule=gpipe"],
    "pp4": ["parallel.pp=4"],
}
BASE = [*EXACT, "model.num_layers=4", "train.batch_sequences=16", "train.accumulation=4"]
STARVED = ("past_dense", "tied")
"""Models that also run with ranks whose experts get no row, and without shared memory."""
PAIRS = [(name, split) for name in CROSSING for split in SPLITS]
PAIRS += [(name, split) for name in STARVED for split in ("starved", "apart")]


@pytest.fixture(scope="module")
def grid(tmp_path_factory, config_file) -> Path:
    """What one process and four computed for every model and split."""
    out = tmp_path_factory.mktemp("stages")
    cases = {name: {"overrides": [*BASE, *more]} for name, more in CROSSING.items()}
    run([sys.executable, WORKER, str(config_file), str(out), json.dumps(cases)], 300)
    split = {
        f"{name}-{split}": {"overrides": [*case["overrides"], *options]}
        for name, case in cases.items()
        for split, options in SPLITS.items()
    }
    for name in STARVED:
        case = {"overrides": [*cases[name]["overrides"], *SPLITS["pp2-ep2"]]}
        split[f"{name}-starved"] = {**case, "starved": True}
        split[f"{name}-apart"] = {**case, "apart": True}
    torchrun(4, WORKER, str(config_file), str(out), json.dumps(split), timeout=600)
    starved = {f"{n}-one": {**cases[n], "starved": True} for n in STARVED}
    run([sys.executable, WORKER, str(config_file), str(out), json.dumps(starved)], 300)
    return out


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("name", "split"), PAIRS)
def test_four_ranks_in_stages_compute_what_one_process_does(grid, name, split):
    expected = gathered_from(grid, f"{name}-one" if split == "starved" else name, 1)
    actual = gathered_from(grid, f"{name}-{split}", 4)
    worst = {}
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a["counts"], e["counts"])
        for kind, difference in differences(a, e).items():
            worst[kind] = max(difference, worst.get(kind, 0.0))
        norm = torch.stack([gradient.norm() for gradient in a["gradients"].values()]).norm()
        assert a["grad_norm"] == pytest.approx(float(norm), rel=1e-12)
    shown = " ".join(f"{kind}={difference:.1e}" for kind, difference in worst.items())
    print(f"{name:20} {split:10} {shown}")
    assert max(worst.values()) <= 1e-12, worst


RUN = [
    *EXACT,
    "train.steps=9",
    "train.accumulation=2",
    "train.eval_sequences=5",  # the last batch of an evaluation leaves ranks without rows
    "model.tie_embeddings=true",
]


def without(run_dir: Path, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(run_dir / f"checkpoints/step-{step:08d}")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["router.lookahead=previous_block", "block={kind: robust}"])
def test_a_run_goes_on_with_and_without_stages_and_exports_the_same(tmp_path, config_file, kind):
    """Steps 1 to 3 in two stages, 4 to 6 in one process, 7 to 9 in two stages with EP."""
    options = [str(config_file), *RUN, f"model.moe.{kind}"]
    one = tmp_path / "one"
    training(*options, f"run_dir={one}")
    moved = tmp_path / "moved"
    staged = [*options, f"run_dir={moved}", "parallel.pp=2", "checkpoint.keep=9"]
    moeyard_train(*staged, "--nproc", "2")
    without(moved, 6, 9)
    training(*options, f"run_dir={moved}", "checkpoint.keep=9")
    without(moved, 9)
    shown = moeyard_train(*staged, "--nproc", "4", "parallel.ep=2")
    assert "event=resumed step=6" in shown
    expected = StoredTensors(one / "checkpoints/step-00000009")
    found = StoredTensors(moved / "checkpoints/step-00000009")
    keys = sorted(key for key in expected if not key.startswith("rng/"))
    assert sorted(key for key in found if not key.startswith("rng/")) == keys
    for key in keys:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)
    records = [json.loads((d / "metrics.jsonl").read_text().splitlines()[-1]) for d in (one, moved)]
    for name in ("loss", "eval_loss", "eval_loss_per_byte", "balance", "z", "grad_norm"):
        assert records[1][name] == pytest.approx(records[0][name], rel=1e-11)
    for name in ("expert_tokens", "moe_layers", "tokens"):
        assert records[1][name] == records[0][name]
    starts = [json.loads(line) for line in (moved / "starts.jsonl").read_text().splitlines()]
    assert len({(s["parameters"], s["active_parameters"]) for s in starts}) == 1
    folders = [tmp_path / "one-model", tmp_path / "moved-model"]
    for run_dir, folder in zip((one, moved), folders, strict=True):
        export(run_dir, folder)
    started = [*options, f"start_from={folders[1]}", "parallel.pp=2", f"run_dir={tmp_path}/new"]
    assert "event=evaluated step=9" in moeyard_train(*started, "--nproc", "2")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("options", [["parallel.pp=2"], ["parallel.dense=ddp"]], ids=str)
def test_a_checkpoint_has_the_same_bits_whatever_opens_and_saves_it(tmp_path, config_file, options):
    one = tmp_path / "one"
    given = [*RUN, "train.steps=3"]
    training(str(config_file), f"run_dir={one}", *given)
    worker = str(Path(__file__).parent.parent / "training" / "reshard_worker.py")
    case = "saved=" + ",".join([*given, *options])
    torchrun(2, worker, str(config_file), str(one), str(tmp_path / "out"), case)
    expected = StoredTensors(one / "checkpoints/step-00000003")
    found = StoredTensors(tmp_path / "out/saved/checkpoints/step-00000003")
    for key in (key for key in expected if not key.startswith("rng/")):
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_of_a_stage_ends_the_run_with_a_sentence(tmp_path, config_file, victim):
    program = ["--max-restarts", "0", "-m", "moeyard.training"]
    overrides = ["parallel.ep=1", "parallel.pp=2", "train.accumulation=4", "train.steps=100000"]
    launch = Launch(config_file, tmp_path / "run", program, overrides)
    launch.start()
    wait_until(lambda: "event=started" in launch.log(), "training", 60)
    wait_until((tmp_path / "run/latest").exists, "a checkpoint", 60)
    os.kill(launch.workers()[victim], signal.SIGKILL)
    assert launch.wait() != 0
    log = launch.log()
    assert f"rank {victim} on" in log and "ended without a word" in log, log
    assert "failed to run forward" not in log and "Failed to run stage" not in log
