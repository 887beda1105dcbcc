"""The same numbers anywhere: loss, gradients, clip norm and weights on 1, 2 and 4 ranks.

Dense parameters are replicated (ddp) or sharded (fsdp); or layers are split into stages (stages).
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from equivalence import EXACT, WORKER, differences, gathered_from
from launch import run, torchrun

TORCH = "parallel.backend=torch"  # in place of the reference
DOCUMENTS = "OUT/documents.jsonl"
SHARDED = ["optimizer.shard_experts=true"]
"""Where ranks hold the same experts, in the other worlds it changes nothing."""
VARIANTS = {
    "plain": {"overrides": []},
    "accumulated": {"overrides": ["train.accumulation=2"]},
    "recomputed": {"overrides": ["train.recompute=true"]},
    "both": {"overrides": ["train.accumulation=2", "train.recompute=true"]},
    "torch": {"overrides": [TORCH]},
    "hash": {"overrides": [TORCH, "model.moe.router={kind: hash, k: 2}"]},
    "own_router": {
        "overrides": [
            TORCH,
            "train.accumulation=2",
            "model.moe.router={kind: 'cosine_router:Cosine', k: 2, confidence_loss: 0.3}",
        ],
    },
    "shared_tied": {
        "overrides": [TORCH, "model.moe.d_shared=8", "model.tie_embeddings=true"],
    },
    "dense_layer": {"overrides": [TORCH, "model.dense_layers=[0]", "model.d_ff=40"]},
    "pregated": {"overrides": [TORCH, "model.moe.router.lookahead=previous_block"]},
    "pregated_both": {
        "overrides": [
            TORCH,
            "model.moe.router.lookahead=previous_block",
            "train.accumulation=2",
            "train.recompute=true",
        ],
    },
    "preattention": {
        "overrides": [TORCH, "model.moe.router.lookahead=attention_input"],
    },
    "deepseek": {
        "overrides": [
            TORCH,
            "model.moe.router={kind: topk, k: 2, score: sigmoid, num_groups: 2, top_groups: 1, "
            "bias_update_rate: 0.01, sequence_balance_loss: 0.1, balance_loss: 0, scale: 2.5}",
            "model.moe.activation=reglu",
            "train.accumulation=2",
        ],
    },
    "sparsity": {
        "overrides": [
            TORCH,
            "model.moe.activation=relu",
            "model.moe.router={kind: sparsity, z_loss: 0.1}",
            "train.accumulation=2",
            "train.recompute=true",
        ],
        "biased": True,
        "apart": True,
    },
    "robust_both": {
        "overrides": [
            TORCH,
            "model.moe.block={kind: robust}",
            "model.moe.router.lookahead=previous_block",
            "train.accumulation=2",
            "train.recompute=true",
        ],
    },
    "adam_both": {  # a larger epsilon: else the step is steep at 0, and rounding grows
        "overrides": [
            "model.moe.block={kind: adam, adam_layers: null, decay: 0.1, epsilon: 1.0e-4}",
            "train.accumulation=2",
            "train.recompute=true",
        ],
    },
    "fewer_rows_than_ranks": {"overrides": [TORCH, "model.head_dim=2"]},  # norms of 2 on 4 ranks
    "packed": {
        "overrides": [
            "train.packing=documents",
            "train.recompute=true",
            f"data.source={DOCUMENTS}",
        ],
    },
    "biased": {"overrides": [TORCH, "train.accumulation=2"], "biased": True},
    "router": {"overrides": [TORCH, "train.parameters=router"]},
    "lora": {
        "overrides": [
            "train.parameters=lora",
            "train.accumulation=2",
            "train.recompute=experts",
        ],
    },
    "lora_of_experts_apart": {
        "overrides": [
            *("train.parameters=lora", "lora.targets=[experts]"),
            "model.moe.activation=gelu",
        ],
        "apart": True,
    },
    "lora_of_experts_starved": {
        "overrides": ["train.parameters=lora", "lora.targets=[experts]"],
        "starved": True,
    },
    "lora_experts": {
        "overrides": [
            *("model.moe=null", "model.d_ff=40", "train.parameters=lora"),
            "lora={rank: 3, targets: [attention, mlp], experts: 3, balance_loss: 0.1}",
            "train.accumulation=2",
        ],
    },
    "lora_experts_both": {
        "overrides": [
            *("model.moe=null", "model.d_ff=40", "train.parameters=lora"),
            "lora={rank: 3, targets: [mlp], experts: 3, weighting: probability}",
            "train.recompute=true",
        ],
    },
    "apart": {"overrides": [TORCH], "apart": True},
    "apart_both": {
        "overrides": ["train.accumulation=2", "train.recompute=true"],
        "apart": True,
    },
    "muon": {
        "overrides": [
            *(TORCH, *SHARDED, "optimizer.kind=muon"),
            *("model.dense_layers=[0]", "model.d_ff=40"),
        ],
    },
    "frugal": {
        "overrides": [
            *(TORCH, *SHARDED, "optimizer.kind=frugal"),
            *("optimizer.density=0.3", "optimizer.refresh_steps=2"),
        ],
    },
    "sharded": {"overrides": SHARDED},
    "sharded_apart": {"overrides": SHARDED, "apart": True},
    "sparse_experts": {
        "overrides": [
            *(TORCH, *SHARDED, "train.accumulation=2"),
            "train.sparse_experts={n: 2, m: 4, decay: 0.1, start: 1}",
        ],
    },
    "starved": {"overrides": [], "starved": True},
    "starved_both": {
        "overrides": ["train.accumulation=2", "train.recompute=true"],
        "starved": True,
    },
}
STAGES = ("stages", 4, 2)
WORLDS = [(dense, *w) for dense in ("ddp", "fsdp") for w in ((2, 1), (2, 2), (4, 2))] + [STAGES]
"""(how dense parameters are held, ranks, expert-parallel degree)."""
HELD = {
    "ddp": ["parallel.dense=ddp"],
    "fsdp": ["parallel.dense=fsdp"],
    "stages": ["parallel.pp=2"],
}
ALWAYS = (("ddp", 2, 2), ("fsdp", 2, 2))
"""Every variant runs here by default, and in the other worlds in the slow tests."""
SOMETIMES = (("ddp", 2, 1), ("fsdp", 4, 2))
SOME = ("plain", "both", "deepseek", "fewer_rows_than_ranks", "starved_both", "lora", "bf16")
SOME += ("muon", "frugal", "sharded", "sharded_apart", "bf16_sharded")
"""Variants that run in those worlds, too, by default."""
IN_STAGES = ("plain", "shared_tied", "pregated_both", "robust_both", "bf16_momentum")
"""Variants that run in stages by default."""
WITHOUT_MOE = ("lora_experts", "lora_experts_both")
"""Dense models, which run everywhere by default where ep is 1, on two ranks."""
NOT_IN_STAGES = ("router", "lora", "lora_of_experts_apart", "lora_of_experts_starved", "bf16_lora")
FP64_TOLERANCE = 1e-12
ONE = "-ddp-w1-ep1"
"""Suffix of what one process computed."""
BF16_VARIANTS = {
    "bf16": [],
    "bf16_both": ["train.accumulation=2", "train.recompute=true"],
    "bf16_lora": ["train.parameters=lora"],
    "bf16_sharded": SHARDED,
    "bf16_momentum": ["model.moe.block={kind: momentum}", "train.accumulation=2"],
}
BF16_TOLERANCE = {"loss": 2e-3, "grad_norm": 3e-2, "gradients": 6e-2, "weights": 2e-2}
"""First step only: later on a rounding difference may change a choice of expert."""


def is_default(variant: str, world: tuple[str, int, int]) -> bool:
    if world == STAGES:
        return variant in IN_STAGES
    if variant in WITHOUT_MOE:
        return True
    return world in ALWAYS or (world in SOMETIMES and variant in SOME)


def exists(variant: str, world: tuple[str, int, int]) -> bool:
    if variant in WITHOUT_MOE:
        return world[2] == 1
    return world != STAGES or variant not in NOT_IN_STAGES


def in_worlds(variants) -> list:
    """Return each variant in each world as parameters; those not run by default are slow."""
    return [
        pytest.param(variant, *world, marks=() if is_default(variant, world) else pytest.mark.slow)
        for variant in variants
        for world in WORLDS
        if exists(variant, world)
    ]


def all_cases(options: list[str]) -> dict[str, dict]:
    """Return every variant by its name, in fp64 and bf16."""
    fp64 = {n: {**v, "overrides": [*EXACT, *v["overrides"], *options]} for n, v in VARIANTS.items()}
    bf16 = {
        name: {"overrides": ["train.precision=bf16", *more, *options]}
        for name, more in BF16_VARIANTS.items()
    }
    return fp64 | bf16


def suffix(dense: str, ranks: int, ep: int) -> str:
    return f"-{dense}-w{ranks}-ep{ep}"


class Results:
    """What every variant computed, in a folder; one launch per number of ranks, on first use."""

    def __init__(self, out: Path, config_file: Path) -> None:
        self.out, self._config = out, str(config_file)
        self._launched: set[tuple[int, bool]] = set()

    def need(self, name: str, ranks: int) -> None:
        """Run what belongs to the launch of ``name``, unless it has run."""
        variant, _, world = name.partition("-")
        dense = world.partition("-")[0]
        ep = int(world[-1])
        launch = (ranks, ranks == 1 or is_default(variant, (dense, ranks, ep)))
        if launch in self._launched:
            return
        self._launched.add(launch)
        cases = {}
        worlds = [w for w in WORLDS if w[1] == ranks] if ranks > 1 else [("ddp", 1, 1)]
        for world in worlds:
            dense, _, ep = world
            options = [*HELD[dense], f"parallel.ep={ep}"] if ranks > 1 else []
            for variant, case in all_cases(options).items():
                if world == STAGES and "train.accumulation=2" not in case["overrides"]:
                    case["overrides"].append("parallel.pp_schedule=gpipe")
                is_here = ranks == 1 or is_default(variant, world) == launch[1]
                if is_here and exists(variant, world):
                    cases[f"{variant}{suffix(dense, ranks, ep)}"] = case
        arguments = (WORKER, self._config, str(self.out), as_json(cases, self.out))
        if ranks == 1:
            run([sys.executable, *arguments], 300)
        else:
            torchrun(ranks, *arguments)


@pytest.fixture(scope="module")
def results(tmp_path_factory, config_file):
    out = tmp_path_factory.mktemp("equivalence")
    texts = [f"def f{n}(x):\n" + "    x += 1\n" * (n % 9) for n in range(400)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (out / Path(DOCUMENTS).name).write_text("".join(lines))
    return Results(out, config_file)


def as_json(cases: dict[str, dict], out: Path) -> str:
    return json.dumps(cases).replace(DOCUMENTS, str(out / Path(DOCUMENTS).name))


def gathered(results: Results, name: str, ranks: int) -> list[dict]:
    """Run a case if needed and join the ranks' shares."""
    results.need(name, ranks)
    return gathered_from(results.out, name, ranks)


@pytest.mark.dist
@pytest.mark.parametrize(("variant", "dense", "ranks", "ep"), in_worlds(VARIANTS), ids=str)
def test_equals_one_rank_to_the_last_digits_in_fp64(results, variant, dense, ranks, ep):
    expected = gathered(results, f"{variant}{ONE}", 1)
    actual = gathered(results, f"{variant}{suffix(dense, ranks, ep)}", ranks)
    for step, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a["counts"], e["counts"])
        found = differences(a, e)
        print(f"{variant:21} {dense:4} ranks={ranks} ep={ep} step={step} " + show(found))
        assert max(found.values()) <= FP64_TOLERANCE, found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("variant", "dense", "ranks", "ep"), in_worlds(["plain", "router", "lora"]), ids=str
)
def test_the_clip_norm_counts_each_trained_parameter_once(results, variant, dense, ranks, ep):
    for step in gathered(results, f"{variant}{suffix(dense, ranks, ep)}", ranks):
        norm = torch.stack([gradient.norm() for gradient in step["gradients"].values()]).norm()
        assert step["grad_norm"] == pytest.approx(float(norm), rel=1e-12)


@pytest.mark.dist
@pytest.mark.parametrize(("variant", "plain"), [("recomputed", "plain"), ("both", "accumulated")])
def test_recompute_changes_no_bit(results, variant, plain):
    actual = gathered(results, f"{variant}{ONE}", 1)
    expected = gathered(results, f"{plain}{ONE}", 1)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a["counts"], e["counts"])
        assert max(differences(a, e).values()) == 0


@pytest.mark.dist
@pytest.mark.parametrize(("variant", "plain"), [("sharded", "plain"), ("bf16_sharded", "bf16")])
def test_sharing_out_the_state_of_experts_changes_no_bit(results, variant, plain):
    actual = gathered(results, f"{variant}-ddp-w2-ep1", 2)
    expected = gathered(results, f"{plain}-ddp-w2-ep1", 2)
    for a, e in zip(actual, expected, strict=True):
        assert a["grad_norm"] == e["grad_norm"]
        assert max(differences(a, e).values()) == 0


@pytest.mark.dist
@pytest.mark.parametrize(("dense", "ranks", "ep"), ALWAYS, ids=str)
def test_a_rank_without_tokens_really_had_none(results, dense, ranks, ep):
    for step in gathered(results, f"starved{suffix(dense, ranks, ep)}", ranks):
        assert int(step["counts"][:, 2:].sum()) == 0 and int(step["counts"].sum()) == 2 * 2 * 8 * 32
        assert all(
            float(g.abs().max()) == 0 for k, g in step["gradients"].items() if "experts.3" in k
        )


@pytest.mark.dist
@pytest.mark.parametrize(("variant", "dense", "ranks", "ep"), in_worlds(BF16_VARIANTS), ids=str)
def test_equals_one_rank_within_tolerance_in_bf16(results, variant, dense, ranks, ep):
    expected = gathered(results, f"{variant}{ONE}", 1)[0]
    actual = gathered(results, f"{variant}{suffix(dense, ranks, ep)}", ranks)[0]
    found = differences(actual, expected)
    # Relative to each tensor's norm: single entries near zero say nothing in bf16.
    for kind in ("gradients", "weights"):
        found[kind] = max(
            float((actual[kind][k] - e).norm() / e.norm().clamp(min=1e-30))
            for k, e in expected[kind].items()
            if kind == "gradients" or not k.endswith("lora_b")  # Adam's first step: only signs
        )
    print(f"{variant:21} {dense:4} ranks={ranks} ep={ep} step=0 " + show(found))
    for kind, tolerance in BF16_TOLERANCE.items():
        assert found[kind] <= tolerance, found


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [f"plain{ONE}", "plain-ddp-w2-ep2", "both-ddp-w2-ep2", "both-fsdp-w4-ep2"]
)
def test_routed_rows_are_tokens_times_choices(results, name):
    ranks = int(name.split("-w")[1][0])
    for step in gathered(results, name, ranks):
        assert step["counts"].sum(dim=1).tolist() == [8 * 32 * 2] * 2


def show(found: dict[str, float]) -> str:
    return " ".join(f"{kind}={value:.1e}" for kind, value in found.items())
