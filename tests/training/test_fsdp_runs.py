"""Runs with sharded dense parameters: checkpoints, exports, evaluation, share of memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from moeyard.cli import main as command
from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.checkpoint import StoredTensors
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

from kills import digest
from launch import torchrun

WORKER = str(Path(__file__).parent / "fsdp_worker.py")
FSDP, EP2, KEEP = "parallel.dense=fsdp", "parallel.ep=2", "checkpoint.keep=9"
EXACT = ["train.precision=fp64", "parallel.backend=reference"]
KINDS = {
    "bf16_shared_tied": [
        "train.precision=bf16",
        "model.moe.d_shared=8",
        "model.tie_embeddings=true",
    ],
    "hash_mixed": [
        "model.moe.router={kind: hash, k: 2}",
        "model.dense_layers=[0]",
        "model.d_ff=40",
        "model.head_dim=2",  # norms of two entries: half of four ranks hold none of them
    ],
    "muon": ["optimizer.kind=muon", "model.d_ff=40", "model.dense_layers=[0]"],
    "frugal_bf16_sharded": [
        *("optimizer.kind=frugal", "optimizer.density=0.3", "optimizer.refresh_steps=2"),
        *("optimizer.shard_experts=true", "train.precision=bf16"),
    ],
}
MOVED = [*EXACT, KEEP, "train.steps=9"]
UNBROKEN = [FSDP, EP2, "train.precision=bf16", "train.accumulation=2", "train.recompute=true"]
UNBROKEN += ["model.moe.router.jitter=0.1"]
UNBROKEN += ["optimizer.warmup_steps=9"]  # so that the rate does not depend on the last step
EVALUATED = ["train.precision=fp64", "train.eval_every=2"]
DENSE = [*EXACT, "model.moe=null", "model.d_ff=40", "train.eval_sequences=3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config_file):
    """Run everything in one launch of 2 ranks, one of 4, and this process."""
    folder = tmp_path_factory.mktemp("fsdp")

    def job(name: str, *options: str) -> list[str]:
        return [*options, f"run_dir={folder}/{name}"]

    def launch(ranks: int, jobs: list[list[str]]) -> None:
        output = torchrun(ranks, WORKER, str(config_file), json.dumps(jobs))
        (folder / f"log-{ranks}.txt").write_text(output)

    def forget(name: str, *steps: int) -> None:
        for step in steps:
            shutil.rmtree(folder / name / f"checkpoints/step-{step:08d}")

    first = [job(kind, *options, KEEP, "train.steps=3") for kind, options in KINDS.items()]
    first += [job("moved", *MOVED), job("evaluated", *EVALUATED, FSDP, EP2)]
    first += [job("dense", *DENSE, FSDP), job("whole", *UNBROKEN)]
    first += [job("parts", *UNBROKEN, "train.steps=3"), job("parts", *UNBROKEN)]
    launch(2, first)
    forget("moved", 6, 9)
    second = [job(kind, "resave", *o, KEEP, FSDP, EP2) for kind, o in KINDS.items()]
    launch(4, [*second, job("moved", *MOVED, FSDP, EP2)])
    forget("moved", 9)
    for kind, options in KINDS.items():
        config = read_run_config(config_file, job(kind, *options, KEEP))
        trainer = Trainer(config, folder / kind, Mesh())
        trainer.saves.save(trainer.saves.resume() + 1, must=True)
    alone = [job("moved", *MOVED), job("one", *MOVED), job("evaluated_one", *EVALUATED)]
    alone += [job("dense_one", *DENSE), job("alone_ddp"), job("alone_fsdp", FSDP)]
    for options in alone:
        assert main([str(config_file), *options]) == 0
    return folder


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def saved(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = StoredTensors(run_dir / f"checkpoints/step-{step:08d}")
    return {key: t for key, t in tensors.items() if not key.startswith("rng/")}


def noted(run_dir: Path, rank: int) -> dict[str, int]:
    return json.loads((run_dir / f"rank-{rank}.json").read_text())


def assert_equal_in_fp64(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-12, atol=1e-13, msg=key)


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_move_between_ddp_and_fsdp_without_losing_a_bit(runs, kind):
    """Trained by ddp on 2 ranks, saved again by fsdp on 4, then by one process."""
    first = saved(runs / kind, 3)
    names = {"muon": ("momentum/", "exp_avg_sq/")}.get(kind, ("exp_avg_sq/",))
    for start in names:
        stored = [tensor for key, tensor in first.items() if key.startswith(start)]
        assert any(float(tensor.abs().max()) > 0 for tensor in stored), start
    for step in (4, 5):
        again = saved(runs / kind, step)
        assert again.keys() == first.keys()
        for key, tensor in first.items():
            assert torch.equal(again[key], tensor), f"{key} differs in step {step}"


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
def test_an_fsdp_run_exports_the_files_of_a_ddp_run(runs, tmp_path, kind):
    for name, step in (("ddp", 3), ("fsdp", 4)):
        checkpoint = f"checkpoints/step-{step:08d}"
        shutil.copytree(runs / kind / checkpoint, tmp_path / name / checkpoint)
        assert command(["export", str(tmp_path / name), str(tmp_path / f"{name}-model")]) == 0
    files = sorted(p.name for p in (tmp_path / "ddp-model").iterdir())
    assert sorted(p.name for p in (tmp_path / "fsdp-model").iterdir()) == files
    assert {"config.json", "model.safetensors"} <= set(files)
    for file in files:
        here, there = (tmp_path / f"{name}-model" / file for name in ("ddp", "fsdp"))
        assert here.read_bytes() == there.read_bytes(), f"{file} differs"


@pytest.mark.dist
def test_a_run_continues_from_ddp_under_fsdp_and_back(runs):
    """ddp on 2 ranks, fsdp on 4, one process: the tensors of the unbroken single-rank run."""
    assert "event=resumed step=3 ranks=4" in (runs / "log-4.txt").read_text()
    assert_equal_in_fp64(saved(runs / "moved", 9), saved(runs / "one", 9))


@pytest.mark.dist
def test_a_resumed_fsdp_run_ends_as_the_unbroken_one(runs):
    assert "event=resumed step=3 ranks=2" in (runs / "log-2.txt").read_text()
    assert digest(runs / "parts") == digest(runs / "whole")


@pytest.mark.dist
def test_gradients_are_reduced_once_a_step_however_many_micro_batches(runs):
    assert noted(runs / "whole", 0)["reductions"] == 6


@pytest.mark.dist
def test_fsdp_logs_and_evaluates_as_one_process(runs):
    """Between steps and at the end, the second rank in the last round without a row."""
    one, two = records(runs / "evaluated_one"), records(runs / "evaluated")
    assert ["eval_loss" in record for record in one] == [False, True] * 3
    for expected, record in zip(one, two, strict=True):
        assert record["expert_tokens"] == expected["expert_tokens"]
        for key in {"loss", "grad_norm", "eval_loss"} & expected.keys():
            assert record[key] == pytest.approx(expected[key], rel=1e-12)


@pytest.mark.dist
def test_a_rank_holds_its_share_of_the_dense_parameters(runs):
    """After the last evaluation: nothing that was gathered for it is left."""
    weights = {k: t for k, t in saved(runs / "evaluated", 6).items() if k.startswith("weight/")}
    routers = sum(t.numel() for key, t in weights.items() if key.endswith("mlp.gate.weight"))
    rest = sum(t.numel() for t in weights.values()) - routers
    held = [noted(runs / "evaluated", rank)["held"] for rank in (0, 1)]
    assert sum(held) == rest + 2 * routers
    assert held[0] - held[1] == 2 * 32  # 257 rows of the embedding and of the head
    assert f"parameters_here={held[0]} " in (runs / "log-2.txt").read_text()


def test_one_process_has_nothing_to_shard(runs):
    assert digest(runs / "alone_fsdp") == digest(runs / "alone_ddp")


@pytest.mark.dist
def test_a_model_without_experts_is_sharded_too(runs):
    assert_equal_in_fp64(saved(runs / "dense", 6), saved(runs / "dense_one", 6))
