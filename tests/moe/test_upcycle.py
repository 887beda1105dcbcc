"""Before training, upcycled folders compute the dense model's function, for every split."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

import moeyard
from moeyard.cli import main
from moeyard.kernels.router import choose, project_and_choose
from moeyard.kernels.values.choice import ChoiceRule
from moeyard.moe.folders.upcycle import upcycle
from moeyard.moe.routers.topk import TopK, TopKRouter

from hf_families import save

TOLERANCE = 1e-5
"""Tolerance of logits, relative to the largest."""
FULL = {"use_sliding_window": False, "intermediate_size": 64}
IDS = torch.randint(0, 96, (3, 31), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    save("qwen3", folder / "qwen3", **FULL)
    for case in ("llama", "llama_bias_tied"):
        save(case, folder / case)
    return folder


def assert_same_logits(actual, expected):
    assert expected.abs().max() > 1
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("moe_layers", ["all", "every-2", "last-half"])
@pytest.mark.parametrize(("split", "num_experts", "k"), [(1, 5, 2), (2, 8, 4), (4, 8, 4)])
def test_the_first_forward_is_the_dense_one(dense, tmp_path, split, num_experts, k, moe_layers):
    given = [f"--num-experts={num_experts}", f"--k={k}", f"--split={split}"]
    arguments = ["upcycle", str(dense / "qwen3"), str(tmp_path / "moe"), *given]
    assert main([*arguments, f"--moe-layers={moe_layers}"]) == 0
    ours = moeyard.load(tmp_path / "moe")
    sparse = {"all": [0, 1, 2], "every-2": [1], "last-half": [1, 2]}[moe_layers]
    assert ours.config.moe_layers == sparse and ours.config.moe.d_expert == 64 // split
    expected = moeyard.load(dense / "qwen3")(IDS)
    assert_same_logits(ours(IDS), expected)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe", output_loading_info=True
    )
    assert isinstance(theirs, Qwen3MoeForCausalLM)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(theirs.eval()(IDS).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "moe_layers", "model_type"),
    [
        ("llama", "all", "mixtral"),
        ("llama", "every-2", "moeyard"),
        ("llama_bias_tied", "all", "moeyard"),
    ],
)
def test_the_family_is_one_that_can_say_it(dense, tmp_path, case, moe_layers, model_type):
    upcycle(dense / case, tmp_path / "moe", 4, 2, split=2, moe_layers=moe_layers)
    values = json.loads((tmp_path / "moe/config.json").read_text())
    assert values["model_type"] == model_type and values["eos_token_id"] == 96
    assert_same_logits(moeyard.load(tmp_path / "moe")(IDS), moeyard.load(dense / case)(IDS))


def test_experts_are_slices_and_the_rows_of_a_copy_are_one(dense, tmp_path):
    upcycle(dense / "qwen3", tmp_path / "moe", 6, 4, split=2)
    upcycle(dense / "qwen3", tmp_path / "other", 6, 4, split=2, seed=1)
    before = load_file(dense / "qwen3/model.safetensors")
    after = load_file(tmp_path / "moe/model.safetensors")
    other = load_file(tmp_path / "other/model.safetensors")
    mlp = "model.layers.1.mlp"
    for expert in range(6):
        rows = slice(32 * (expert % 2), 32 * (expert % 2) + 32)
        for part in ("gate", "up"):
            wanted = before[f"{mlp}.{part}_proj.weight"][rows]
            assert torch.equal(after[f"{mlp}.experts.{expert}.{part}_proj.weight"], wanted)
        wanted = 2 * before[f"{mlp}.down_proj.weight"][:, rows]
        assert torch.equal(after[f"{mlp}.experts.{expert}.down_proj.weight"], wanted)
    router = after[f"{mlp}.gate.weight"]
    assert torch.equal(router[0::2], router[1::2]) and len(router.unique(dim=0)) == 3
    assert 0.015 < float(router.std()) < 0.025
    assert {name for name in after if not torch.equal(after[name], other[name])} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)
    }


def assert_whole_copies(experts_TK, split):
    copies_TCS = experts_TK.sort(dim=1).values.unflatten(1, (-1, split))
    assert torch.equal(copies_TCS % split, torch.arange(split).expand_as(copies_TCS).int())
    assert (copies_TCS // split == copies_TCS[..., :1] // split).all()


def test_copies_are_chosen_whole_where_none_tie():
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.rand(200, 5, generator=generator).repeat_interleave(4, dim=1)
    rule = ChoiceRule(k=8, score="softmax", renormalize=True, scale=1.0, num_groups=1, top_groups=1)
    assert_whole_copies(choose(logits_TE, None, None, rule, wants_sums=False).experts_TK, 4)


def test_the_rule_that_the_lower_id_wins_keeps_tied_copies_whole():
    """Of six copies of four experts, half have the same router row."""
    generator = torch.Generator().manual_seed(1)
    rows_2D = torch.randn(2, 16, generator=generator)
    router = TopKRouter(TopK(k=12), 16, 24).eval()
    router.weight.data.copy_(rows_2D[[0, 1, 0, 0, 1, 1]].repeat_interleave(4, dim=0))
    x_TD = torch.randn(200, 16, generator=generator)
    with torch.no_grad():
        found = project_and_choose(x_TD, router.weight, None, None, router.rule)
    if found is None:
        pytest.skip("the C++ kernels are not here")
    assert_whole_copies(found.experts_TK, 4)
    assert {tuple(row) for row in (found.experts_TK.sort(dim=1).values // 4)[:, ::4].tolist()} == {
        (0, 2, 3),
        (1, 4, 5),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-experts=6", "--k=3", "--split=2"], "k is 3, but tokens must choose whole copies"),
        (["--num-experts=6", "--k=8", "--split=2"], "k is 8, .* use a multiple of 2 from 2 to 6"),
        (["--num-experts=5", "--k=2", "--split=2"], "num_experts is 5, .* use a multiple of 2"),
        (
            ["--num-experts=6", "--k=3", "--split=3"],
            "split is 3; use 1 or another divisor of the MLP's width 64",
        ),
        (["--num-experts=6", "--k=0"], "k is 0"),
        (["--num-experts=70000", "--k=2"], "num_experts is 70000, .* from 1 to 65536"),
        (["--num-experts=-2", "--k=2", "--split=2"], "num_experts is -2, .* from 2 to 65536"),
        (["--num-experts=6", "--k=2", "--split=0"], "split is 0; use 1 or another divisor"),
    ],
)
def test_what_cannot_be_exact_gets_one_sentence(dense, tmp_path, capsys, options, message):
    assert main(["upcycle", str(dense / "qwen3"), str(tmp_path / "moe"), *options]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown) and shown.count("\n") == 1
    assert not (tmp_path / "moe").exists()


def test_a_model_with_experts_is_not_upcycled_again(dense, tmp_path, capsys):
    upcycle(dense / "qwen3", tmp_path / "moe", 4, 2)
    again = ["upcycle", str(tmp_path / "moe"), str(tmp_path / "more"), "--num-experts=4", "--k=2"]
    assert main(again) == 2
    assert "has 4 experts already" in capsys.readouterr().err
