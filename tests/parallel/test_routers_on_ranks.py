"""Every router gives the same numbers when its experts and tokens are on two ranks."""

import json
from pathlib import Path

import pytest
import torch
from other_models import OTHERS, cases_of

from equivalence_worker import run_case
from launch import torchrun
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config_file) -> Path:
    """The results of all routers on two ranks and on one, in a process pair and in this process."""
    out = tmp_path_factory.mktemp("routers")
    worker = str(Path(__file__).parent / "equivalence_worker.py")
    sections = {name: other.write(out) for name, other in OTHERS.items()}
    on_two, on_one = cases(2), cases(1)
    for name, section in sections.items():
        on_two |= cases_of(name, section, 2, OPTIONS)
        on_one |= cases_of(name, section, 1, OPTIONS)
    torchrun(2, worker, str(config_file), str(out), json.dumps(on_two))
    for name, case in on_one.items():
        run_case(config_file, out, name, case, None)
    return out


@pytest.mark.dist
@pytest.mark.parametrize("name", [*NAMES, *(f"{n}{s}" for n in OTHERS for s in ("", "_fsdp"))])
def test_two_ranks_equal_one_in_loss_gradients_weights_and_state(folder, name):
    ranks = [torch.load(folder / f"{name}-2-{rank}.pt") for rank in (0, 1)]
    expected = torch.load(folder / f"{name.removesuffix('_fsdp')}-1-0.pt")
    for alone, first, second in zip(expected, *ranks, strict=True):
        assert first["loss"] == pytest.approx(alone["loss"], rel=1e-10)
        assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-9)
        assert torch.equal(first["counts"], alone["counts"])
        assert first.get("held_out", {}) == pytest.approx(alone.get("held_out", {}), rel=1e-6)
        for kind in ("gradients", "weights"):
            both = first[kind] | second[kind]
            assert both.keys() == alone[kind].keys()
            for key, expected in alone[kind].items():
                torch.testing.assert_close(
                    both[key], expected, **SAME, msg=lambda m, k=key: f"{k}: {m}"
                )


@pytest.mark.dist
@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_go_on_on_one_rank_from_a_checkpoint_of_two(folder, kind):
    whole, rest = (torch.load(folder / f"{kind}{part}-1-0.pt") for part in ("", "-again"))
    assert len(whole) == 3 and len(rest) == 1
    assert rest[0]["loss"] == pytest.approx(whole[2]["loss"], rel=1e-10)
    for kind in ("gradients", "weights"):
        for key, expected in whole[2][kind].items():
            torch.testing.assert_close(rest[0][kind][key], expected, **SAME)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["pictures", "pictures_fsdp"])
def test_averages_of_experts_have_the_same_bits_on_all_ranks(folder, name):
    """Sampling-space experts exchange weights over both ranks after each step."""
    ranks = [torch.load(folder / f"{name}-2-{rank}.pt") for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        averages = [key for key in first["weights"] if ".average." in key]
        assert averages
        for key in averages:
            assert torch.equal(second["weights"][key], first["weights"][key])


@pytest.mark.dist
def test_sampling_space_experts_have_exchanged_weights_and_kept_their_mean(folder):
    steps, owner = torch.load(folder / "pictures-1-0.pt"), "layers.2.mlp"

    def experts(step: int) -> torch.Tensor:
        weights = steps[step]["weights"]
        return torch.stack([weights[f"{owner}.experts.{expert}.fc1"] for expert in range(4)])

    def spread(fc1: torch.Tensor) -> torch.Tensor:
        return (fc1 - fc1.mean(dim=0)).norm() / fc1.norm()

    average = steps[-1]["weights"][f"{owner}.average.fc1"]
    torch.testing.assert_close(experts(-1).mean(dim=0), average)
    assert spread(experts(-1)) < 0.5 * spread(experts(0))  # two more exchanges, of 0.5 each
