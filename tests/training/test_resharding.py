"""Checkpoints have no topology: 1 -> 2 -> 4 -> 1 ranks, EP 1, 2 and 4, DDP and FSDP2.

Each mesh opens what the one before it saved, and saves it; nothing may change, whatever rank holds
it. scripts/test-slow.
"""

import sys
from pathlib import Path

import pytest
import torch

from moeyard.training.checkpoints.checkpoint import StoredTensors
from moeyard.training.checkpoints.export import export

from launch import run, torchrun, training

WORKER = str(Path(__file__).parent / "reshard_worker.py")
DENSE = ("ddp", "fsdp")
OPTIONS = (
    "train.steps=3",
    "checkpoint.every=3",
    "model.moe.router.bias_update_rate=0.01",
    "model.moe.d_shared=8",
    "model.dense_layers=[1]",
    "model.d_ff=40",
    "train.precision=bf16",
)
KINDS = {
    "adamw": (),
    "muon": ("optimizer.kind=muon",),
    "frugal": ("optimizer.kind=frugal", "optimizer.refresh_steps=2"),
    "sharded": ("optimizer.shard_experts=true",),
    "sparse": ("train.sparse_experts.n=1", "train.sparse_experts.m=2"),
}


def cases(eps: tuple[int, ...], options: tuple[str, ...]) -> list[str]:
    shared = ",".join(options)
    return [f"ep{ep}-{d}={shared},parallel.ep={ep},parallel.dense={d}" for ep in eps for d in DENSE]


def newest(run_dir: Path) -> StoredTensors:
    return StoredTensors(next((run_dir / "checkpoints").glob("step-*")))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_mesh_changes_a_bit_of_weights_state_and_buffers(tmp_path, config_file, capsys, kind):
    options = (*OPTIONS, *KINDS[kind])
    one = f"run_dir={tmp_path}/one"
    training(str(config_file), one, *options)
    original = newest(tmp_path / "one")
    keys = sorted(key for key in original if not key.startswith("rng/"))
    kinds = {"weight", "exp_avg", "exp_avg_sq", "buffer", *(["momentum"] if kind == "muon" else [])}
    assert {key.partition("/")[0] for key in keys} == kinds
    source, checked = tmp_path / "one", []
    for ranks, eps in ((2, (1, 2)), (4, (1, 2, 4)), (1, (1,))):
        out, names = tmp_path / f"on{ranks}", cases(eps, options)
        arguments = [WORKER, str(config_file), str(source), str(out), *names]
        if ranks > 1:
            torchrun(ranks, *arguments)
        else:
            run([sys.executable, *arguments], timeout=120)
        for case in names:
            name = case.partition("=")[0]
            found = newest(out / name)
            assert sorted(key for key in found if not key.startswith("rng/")) == keys
            for key in keys:
                assert torch.equal(found[key], original[key]), f"{key} on {ranks} ranks, {name}"
            export(out / name, out / f"{name}-model")
            checked.append(f"{ranks} ranks {name}")
            source = out / name  # the next world opens what this one saved
    folders = [tmp_path / f"on{r}" / f"ep{e}-{d}-model" for r, e, d in WRITTEN]
    for file in sorted(path.name for path in folders[0].iterdir()):
        contents = {(folder / file).read_bytes() for folder in folders}
        assert len(contents) == 1, f"{file} depends on the mesh"
    with capsys.disabled():
        print(f"\n{len(keys)} tensors bit-equal and one export on: {', '.join(checked)}")


WRITTEN = [
    (ranks, ep, dense)
    for ranks, eps in ((2, (1, 2)), (4, (1, 2, 4)), (1, (1,)))
    for ep in eps
    for dense in DENSE
]
