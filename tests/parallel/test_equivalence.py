"""The same numbers anywhere: loss, gradients, clip norm and weights on 1, 2 and 4 ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from launch import run, torchrun

WORKER = str(Path(__file__).parent / "equivalence_worker.py")
EXACT = ["train.precision=fp64", "parallel.backend=reference"]
TORCH = "parallel.backend=torch"  # in place of the reference
DOCUMENTS = "OUT/documents.jsonl"
VARIANTS = {
    "plain": {"overrides": []},
    "accumulated": {"overrides": ["train.accumulation=2"]},
    "recomputed": {"overrides": ["train.recompute=true"]},
    "both": {"overrides": ["train.accumulation=2", "train.recompute=true"]},
    "torch": {"overrides": [TORCH]},
    "hash": {"overrides": [TORCH, "model.moe.router={kind: hash, k: 2}"]},
    "shared_tied": {
        "overrides": [TORCH, "model.moe.d_shared=8", "model.tie_embeddings=true"],
    },
    "dense_layer": {"overrides": [TORCH, "model.dense_layers=[0]", "model.d_ff=40"]},
    "packed": {
        "overrides": [
            "train.packing=documents",
            "train.recompute=true",
            f"data.source={DOCUMENTS}",
        ],
    },
    "starved": {"overrides": [], "starved": True},
    "starved_both": {
        "overrides": ["train.accumulation=2", "train.recompute=true"],
        "starved": True,
    },
}
WORLDS = [(2, 1), (2, 2), (4, 2)]
"""(ranks, expert-parallel degree)."""
FP64_TOLERANCE = 1e-12
BF16_TOLERANCE = {"loss": 2e-3, "grad_norm": 3e-2, "gradients": 6e-2, "weights": 2e-2}
"""First step only: later on a rounding difference may change a choice of expert."""


def cases(ep: int, precision: list[str], suffix: str) -> dict[str, dict]:
    return {
        f"{name}{suffix}": {**v, "overrides": [*precision, *v["overrides"], f"parallel.ep={ep}"]}
        for name, v in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory, config_file):
    """Run every variant on every mesh: one launch per number of ranks."""
    out = tmp_path_factory.mktemp("equivalence")
    texts = [f"def f{n}(x):\n" + "    x += 1\n" * (n % 9) for n in range(400)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (out / Path(DOCUMENTS).name).write_text("".join(lines))
    bf16 = ["train.precision=bf16"]
    one = cases(1, EXACT, "-w1-ep1") | {
        "bf16-w1-ep1": {"overrides": bf16},
    }
    run(
        [
            sys.executable,
            WORKER,
            str(config_file),
            str(out),
            json.dumps(one).replace("OUT", str(out)),
        ],
        300,
    )
    for ranks in (2, 4):
        here = {}
        for _, ep in [w for w in WORLDS if w[0] == ranks]:
            here |= cases(ep, EXACT, f"-w{ranks}-ep{ep}")
            here[f"bf16-w{ranks}-ep{ep}"] = {"overrides": [*bf16, f"parallel.ep={ep}"]}
        torchrun(
            ranks, WORKER, str(config_file), str(out), json.dumps(here).replace("OUT", str(out))
        )
    return out


def as_json(cases: dict[str, dict], out: Path) -> str:
    return json.dumps(cases).replace(DOCUMENTS, str(out / Path(DOCUMENTS).name))


def gathered(out: Path, name: str, ranks: int) -> list[dict]:
    """Join the ranks' shares; what several ranks hold must be the same on all of them."""
    steps = [torch.load(out / f"{name}-{rank}.pt") for rank in range(ranks)]
    joined = []
    for shares in zip(*steps, strict=True):
        whole = {k: shares[0][k] for k in ("loss", "balance", "grad_norm", "counts")}
        for share in shares:
            assert share["loss"] == whole["loss"] and share["grad_norm"] == whole["grad_norm"]
            assert torch.equal(share["counts"], whole["counts"])
            for kind in ("gradients", "weights"):
                held = whole.setdefault(kind, {})
                for key, tensor in share[kind].items():
                    assert key not in held or torch.equal(held[key], tensor), f"{key} differs"
                    held[key] = tensor
        joined.append(whole)
    return joined


def differences(actual: dict, expected: dict) -> dict[str, float]:
    """Return the largest difference of each kind, relative to the largest expected value."""
    found = {
        name: abs(actual[name] - expected[name]) / max(abs(expected[name]), 1e-30)
        for name in ("loss", "balance", "grad_norm")
    }
    for kind in ("gradients", "weights"):
        assert actual[kind].keys() == expected[kind].keys()
        found[kind] = max(
            float((actual[kind][k] - e).abs().max() / e.abs().max().clamp(min=1e-30))
            for k, e in expected[kind].items()
        )
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "ep"), WORLDS, ids=lambda v: str(v))
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_one_rank_to_the_last_digits_in_fp64(results, variant, ranks, ep):
    expected = gathered(results, f"{variant}-w1-ep1", 1)
    actual = gathered(results, f"{variant}-w{ranks}-ep{ep}", ranks)
    for step, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a["counts"], e["counts"])
        found = differences(a, e)
        print(f"{variant:13} ranks={ranks} ep={ep} step={step} " + show(found))
        assert max(found.values()) <= FP64_TOLERANCE, found


@pytest.mark.dist
@pytest.mark.parametrize(("variant", "plain"), [("recomputed", "plain"), ("both", "accumulated")])
def test_recompute_changes_no_bit(results, variant, plain):
    actual = gathered(results, f"{variant}-w1-ep1", 1)
    expected = gathered(results, f"{plain}-w1-ep1", 1)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a["counts"], e["counts"])
        assert max(differences(a, e).values()) == 0


@pytest.mark.dist
def test_a_rank_without_tokens_really_had_none(results):
    for step in gathered(results, "starved-w2-ep2", 2):
        assert int(step["counts"][:, 2:].sum()) == 0 and int(step["counts"].sum()) == 2 * 2 * 8 * 32
        assert all(
            float(g.abs().max()) == 0 for k, g in step["gradients"].items() if "experts.3" in k
        )


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "ep"), WORLDS, ids=lambda v: str(v))
def test_equals_one_rank_within_tolerance_in_bf16(results, ranks, ep):
    expected = gathered(results, "bf16-w1-ep1", 1)[0]
    actual = gathered(results, f"bf16-w{ranks}-ep{ep}", ranks)[0]
    found = differences(actual, expected)
    # Relative to each tensor's norm: single entries near zero say nothing in bf16.
    for kind in ("gradients", "weights"):
        found[kind] = max(
            float((actual[kind][k] - e).norm() / e.norm().clamp(min=1e-30))
            for k, e in expected[kind].items()
        )
    print(f"bf16          ranks={ranks} ep={ep} step=0 " + show(found))
    for kind, tolerance in BF16_TOLERANCE.items():
        assert found[kind] <= tolerance, found


@pytest.mark.dist
@pytest.mark.parametrize("name", ["plain-w1-ep1", "plain-w2-ep2", "both-w4-ep2"])
def test_routed_rows_are_tokens_times_choices(results, name):
    ranks = int(name.split("-w")[1][0])
    for step in gathered(results, name, ranks):
        assert step["counts"].sum(dim=1).tolist() == [8 * 32 * 2] * 2


def show(found: dict[str, float]) -> str:
    return " ".join(f"{kind}={value:.1e}" for kind, value in found.items())
