"""Super-resolution gives the same numbers when its experts and images are on two ranks.

Sampling-space experts exchange weights over both ranks after each step, and their average is the
same everywhere.
"""

import json
from pathlib import Path

import pytest
import torch

import pictures
from equivalence_worker import run_case
from launch import torchrun

OPTIONS = ["train.precision=fp64", "parallel.backend=reference", "train.accumulation=2"]
SAME = {"rtol": 1e-9, "atol": 1e-12}


def cases(ep: int, source: Path) -> dict[str, dict]:
    """A run, one with shards, and one that goes on on one rank from a checkpoint of two."""
    data = {"format": "super_resolution", "source": str(source)}
    overrides = [
        *OPTIONS,
        f"parallel.ep={ep}",
        f"model={json.dumps(pictures.MODEL)}",
        f"data={json.dumps(data)}",
        "train.batch_sequences=8",
    ]
    case = {"overrides": overrides, "data": "images"}
    again = {"until": 2, "saves": True} if ep == 2 else {"resumes": "again-2"}
    shards = ["parallel.dense=fsdp"] if ep == 2 else []
    return {
        f"whole-{ep}": case,
        f"fsdp-{ep}": case | {"overrides": [*overrides, *shards]},
        f"again-{ep}": case | again,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config_file) -> Path:
    """The results on two ranks and on one, in a process pair and in this process."""
    out = tmp_path_factory.mktemp("images")
    worker = str(Path(__file__).parent / "equivalence_worker.py")
    source = pictures.write(out / "images.npz")
    torchrun(2, worker, str(config_file), str(out), json.dumps(cases(2, source)))
    for name, case in cases(1, source).items():
        run_case(config_file, out, name, case, None)
    return out


def compare(found: dict, alone: dict) -> None:
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-10)
    for kind in ("gradients", "weights"):
        assert found[kind].keys() == alone[kind].keys()
        for key, expected in alone[kind].items():
            torch.testing.assert_close(
                found[kind][key], expected, **SAME, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.dist
@pytest.mark.parametrize("name", ["whole", "fsdp"])
def test_two_ranks_equal_one_in_loss_gradients_weights_and_averages(folder, name):
    ranks = [torch.load(folder / f"{name}-2-{rank}.pt") for rank in (0, 1)]
    for alone, first, second in zip(torch.load(folder / f"{name}-1-0.pt"), *ranks, strict=True):
        assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-9)
        assert torch.equal(first["counts"], alone["counts"])
        both = {kind: first[kind] | second[kind] for kind in ("gradients", "weights")}
        compare(first | both, alone)
        for key, average in first["weights"].items():
            if ".average." in key:
                assert torch.equal(second["weights"][key], average)  # the same bits


@pytest.mark.dist
def test_experts_have_exchanged_weights_and_kept_their_mean(folder):
    weights = torch.load(folder / "whole-1-0.pt")[-1]["weights"]
    owner = "layers.2.mlp"
    experts = torch.stack([weights[f"{owner}.experts.{expert}.fc1"] for expert in range(4)])
    torch.testing.assert_close(experts.mean(dim=0), weights[f"{owner}.average.fc1"])
    spread = (experts - experts.mean(dim=0)).norm() / experts.norm()
    first = torch.load(folder / "whole-1-0.pt")[0]["weights"]
    before = torch.stack([first[f"{owner}.experts.{expert}.fc1"] for expert in range(4)])
    spread_before = (before - before.mean(dim=0)).norm() / before.norm()
    assert spread < 0.5 * spread_before  # two more exchanges, of 0.5 each


@pytest.mark.dist
def test_a_run_goes_on_on_one_rank_from_a_checkpoint_of_two(folder):
    whole, rest = (torch.load(folder / f"{name}-1-0.pt") for name in ("whole", "again"))
    assert len(whole) == 3 and len(rest) == 1
    compare(rest[0], whole[2])
