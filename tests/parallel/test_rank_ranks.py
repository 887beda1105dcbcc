"""Generative recommendation gives the same numbers with experts and sessions on two ranks.

Some rows have preference pairs, and the number of them differs between ranks.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml

from moeyard.parallel.mesh import Mesh
from moeyard.training.data.session_pairs import SessionPairs, write_pairs
from moeyard.training.data.sessions import build_sessions_data
from moeyard.training.read_config import complete_run_config

import clicks
from equivalence import EXACT, WORKER, differences, gathered_from
from equivalence_worker import run_case
from launch import torchrun

OPTIONS = [*EXACT, "train.accumulation=2", "data.alignment.weight=3"]


def write_some_pairs(values: dict, folder: Path) -> Path:
    """Write pairs of made-up sessions for a third of the training rows."""
    data = build_sessions_data(complete_run_config(values), folder / "own", Mesh())
    draws = torch.Generator().manual_seed(0)
    sessions_P = torch.arange(0, len(data.train), 3)
    items = [torch.randperm(30, generator=draws)[:6].unflatten(0, (2, 3)) for _ in sessions_P]
    reference_P2 = -20 + torch.rand(len(sessions_P), 2, generator=draws, dtype=torch.float64)
    pairs = SessionPairs(sessions_P, torch.stack(items), reference_P2, 2 * reference_P2)
    write_pairs(folder / "pairs.safetensors", pairs, data.train)
    return folder / "pairs.safetensors"


def cases(ep: int, pairs: Path) -> dict[str, dict]:
    """A run, and one that goes on on one rank from a checkpoint of two."""
    overrides = [*OPTIONS, f"parallel.ep={ep}", f"data.alignment.pairs={pairs}"]
    case = {"overrides": overrides, "data": "sessions"}
    again = {"until": 2, "saves": True} if ep == 2 else {"resumes": "again-2"}
    return {f"whole-{ep}": case, f"again-{ep}": case | again}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The results on two ranks and on one."""
    out = tmp_path_factory.mktemp("sessions")
    values = clicks.write(out / "clicks")
    config = out / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    pairs = write_some_pairs(values, out)
    torchrun(2, WORKER, str(config), str(out), json.dumps(cases(2, pairs)))
    for name, case in cases(1, pairs).items():
        run_case(config, out, name, case, None)
    return out


@pytest.mark.dist
def test_two_ranks_equal_one_in_loss_gradients_and_weights(folder):
    found, alone = gathered_from(folder, "whole-2", 2), gathered_from(folder, "whole-1", 1)
    assert len(found) == 3
    for step, expected in zip(found, alone, strict=True):
        assert max(differences(step, expected).values()) < 1e-9
        assert torch.equal(step["counts"], expected["counts"])


@pytest.mark.dist
def test_a_run_goes_on_on_one_rank_from_a_checkpoint_of_two(folder):
    whole, rest = gathered_from(folder, "whole-1", 1), gathered_from(folder, "again-1", 1)
    assert len(rest) == 1 and max(differences(rest[0], whole[2]).values()) < 1e-9
