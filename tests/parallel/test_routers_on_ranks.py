"""Every router gives the same numbers when its experts and tokens are on two ranks."""

import json
from pathlib import Path

import pytest
import torch

from equivalence_worker import run_case
from labelled import ENCODER, write
from launch import torchrun
from pairs import ENCODER_DECODER
from pairs import write as write_pairs
from router_cases import ACTIVATIONS, CASES, NOT_FOR_TEXT

NAMES = [name for name in CASES if name not in NOT_FOR_TEXT]
OPTIONS = ["train.precision=fp64", "parallel.backend=reference", "train.accumulation=2"]
SAME = {"rtol": 1e-9, "atol": 1e-12}


def cases(ep: int) -> dict[str, dict]:
    return {
        f"{name}-{ep}": {
            "overrides": [
                *OPTIONS,
                f"parallel.ep={ep}",
                f"model.moe.activation={ACTIVATIONS.get(name, 'swiglu')}",
                f"model.moe.router={json.dumps(CASES[name])}",
            ],
            "data": "shared",
        }
        for name in NAMES
    }


def encoder_cases(ep: int, source: Path) -> dict[str, dict]:
    """An encoder that classifies, also with shards; and one that goes on from a checkpoint of two
    ranks."""
    overrides = [
        *OPTIONS,
        f"parallel.ep={ep}",
        f"model={json.dumps(ENCODER)}",
        "data.format=classify",
        f"data.source={source}",
        "data.eval_fraction=0.2",
    ]
    case = {"overrides": overrides, "data": "labelled"}
    again = {"until": 2, "saves": True} if ep == 2 else {"resumes": "encoder-again-2"}
    shards = ["parallel.dense=fsdp"] if ep == 2 else []
    return {
        f"encoder-{ep}": case,
        f"encoder_fsdp-{ep}": case | {"overrides": [*overrides, *shards]},
        f"encoder-again-{ep}": case | again,
    }


def pair_cases(ep: int, source: Path) -> dict[str, dict]:
    """The same of an encoder-decoder that learns pairs of texts."""
    overrides = [
        *OPTIONS,
        f"parallel.ep={ep}",
        f"model={json.dumps(ENCODER_DECODER)}",
        f"data={json.dumps({'format': 'pairs', 'source': str(source), 'eval_fraction': 0.2})}",
    ]
    case = {"overrides": overrides, "data": "pairs"}
    again = {"until": 2, "saves": True} if ep == 2 else {"resumes": "pairs-again-2"}
    shards = ["parallel.dense=fsdp"] if ep == 2 else []
    return {
        f"pairs-{ep}": case,
        f"pairs_fsdp-{ep}": case | {"overrides": [*overrides, *shards]},
        f"pairs-again-{ep}": case | again,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config_file) -> Path:
    """The results of all routers on two ranks and on one, in a process pair and in this process."""
    out = tmp_path_factory.mktemp("routers")
    worker = str(Path(__file__).parent / "equivalence_worker.py")
    source = write(out / "texts.jsonl")
    both = write_pairs(out / "pairs.jsonl")
    on_two, on_one = (cases(ep) | encoder_cases(ep, source) | pair_cases(ep, both) for ep in (2, 1))
    torchrun(2, worker, str(config_file), str(out), json.dumps(on_two))
    for name, case in on_one.items():
        run_case(config_file, out, name, case, None)
    return out


@pytest.mark.dist
@pytest.mark.parametrize("name", [*NAMES, "encoder", "encoder_fsdp", "pairs", "pairs_fsdp"])
def test_two_ranks_equal_one_in_loss_gradients_weights_and_state(folder, name):
    ranks = [torch.load(folder / f"{name}-2-{rank}.pt") for rank in (0, 1)]
    for alone, first, second in zip(torch.load(folder / f"{name}-1-0.pt"), *ranks, strict=True):
        assert first["loss"] == pytest.approx(alone["loss"], rel=1e-10)
        assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-9)
        assert torch.equal(first["counts"], alone["counts"])
        for kind in ("gradients", "weights"):
            both = first[kind] | second[kind]
            assert both.keys() == alone[kind].keys()
            for key, expected in alone[kind].items():
                torch.testing.assert_close(
                    both[key], expected, **SAME, msg=lambda m, k=key: f"{k}: {m}"
                )


@pytest.mark.dist
@pytest.mark.parametrize("name", ["encoder", "pairs"])
def test_other_kinds_go_on_on_one_rank_from_a_checkpoint_of_two(folder, name):
    whole, rest = (torch.load(folder / f"{name}{part}-1-0.pt") for part in ("", "-again"))
    assert len(whole) == 3 and len(rest) == 1
    assert rest[0]["loss"] == pytest.approx(whole[2]["loss"], rel=1e-10)
    for kind in ("gradients", "weights"):
        for key, expected in whole[2][kind].items():
            torch.testing.assert_close(rest[0][kind][key], expected, **SAME)
