"""Experts that are slices or copies of one MLP merge into it again."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.cli import main
from moeyard.moe.folders.merge import merge
from moeyard.moe.folders.upcycle import upcycle

from hf_families import save

FULL = {"use_sliding_window": False, "intermediate_size": 64}
IDS = torch.randint(0, 96, (3, 31), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "qwen3"
    save("qwen3", folder, **FULL)
    return folder


def shake(folder, seed=0):
    """Give every expert other numbers, as training does."""
    generator = torch.Generator().manual_seed(seed)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "expert_hashes.json").unlink()


@torch.no_grad()
@pytest.mark.parametrize(
    ("router", "num_experts", "k", "split"),
    [("topk", 4, 4, 2), ("topk", 3, 1, 1), ("routed_ffn", 4, 2, None), ("stochastic", 4, 1, None)],
)
def test_an_upcycled_model_merges_into_its_source(dense, tmp_path, router, num_experts, k, split):
    upcycle(dense, tmp_path / "moe", num_experts, k, split, router=router)
    given = [] if split is None else [f"--split={split}"]
    assert main(["merge", str(tmp_path / "moe"), str(tmp_path / "merged"), *given]) == 0
    before = load_file(dense / "model.safetensors")
    after = load_file(tmp_path / "merged/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    values = json.loads((tmp_path / "merged/config.json").read_text())
    assert (values["model_type"], values["intermediate_size"]) == ("qwen3", 64)


@torch.no_grad()
def test_random_slices_merge_into_the_same_function_after_training(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", 4, 1, router="stochastic")
    shake(tmp_path / "moe")
    merge(tmp_path / "moe", tmp_path / "merged")
    sparse, merged = moeyard.load(tmp_path / "moe"), moeyard.load(tmp_path / "merged")
    assert (sparse(IDS) - moeyard.load(dense)(IDS)).abs().max() > 1e-2
    torch.testing.assert_close(merged(IDS), sparse(IDS), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_routed_ffn_with_all_slices_and_rows_of_zero_is_the_dense_model(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", 4, 4, router="routed_ffn")
    model = moeyard.load(tmp_path / "moe")
    for router in model.decoder.routers():
        router.weight.data.zero_()
    expected = moeyard.load(dense)(IDS)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
    # Two of four slices are another function: training has to make up for it.
    upcycle(dense, tmp_path / "half", 4, 2, router="routed_ffn")
    assert (moeyard.load(tmp_path / "half")(IDS) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_averaged_experts_are_means(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", 3, 1)
    shake(tmp_path / "moe")
    merge(tmp_path / "moe", tmp_path / "merged", split=1)
    experts = load_file(tmp_path / "moe/model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for part in ("gate", "up", "down"):
        rows = [experts[f"model.layers.1.mlp.experts.{e}.{part}_proj.weight"] for e in range(3)]
        wanted = torch.stack(rows).double().mean(dim=0).float()
        assert torch.equal(merged[f"model.layers.1.mlp.{part}_proj.weight"], wanted)


@torch.no_grad()
def test_a_shared_expert_joins_the_merged_one(tmp_path):
    """With one routed expert of weight 1, routed and shared experts are a sum."""
    save(
        "deepseek_v3",
        tmp_path / "moe",
        n_routed_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=0,
    )
    merge(tmp_path / "moe", tmp_path / "merged")
    ours, merged = moeyard.load(tmp_path / "moe"), moeyard.load(tmp_path / "merged")
    assert merged.config.moe is None and merged.config.d_ff > ours.config.moe.d_expert
    torch.testing.assert_close(merged(IDS), ours(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("qwen3", [], "has no experts; give a folder that has"),
        ("qwen3_moe", ["--split=5"], "split is 5, which does not divide the"),
        ("gpt_oss", [], "activation is clamped_swiglu, but dense layers are swiglu"),
        ("qwen2_moe", [], "a gate on the shared expert, which a dense MLP has not"),
        ("deepseek_v3", [], "merged layers would be .* wide, but the dense ones are"),
    ],
)
def test_what_is_no_dense_mlp_gets_one_sentence(tmp_path, capsys, case, options, message):
    save(case, tmp_path / "source")
    capsys.readouterr()  # transformers' progress
    assert main(["merge", str(tmp_path / "source"), str(tmp_path / "merged"), *options]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown) and shown.count("\n") == 1
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("router", ["routed_ffn", "stochastic"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-experts=4", "--k=2", "--split=2"], "split is 2, .* num_experts = 4 slices"),
        (["--num-experts=4", "--k=5"], "k is 5, but there are 4 slices; use 1 to 4"),
        (["--num-experts=3", "--k=1"], "split is 3; use 1 or another divisor of the MLP's width"),
    ],
)
def test_slices_that_do_not_fit_get_one_sentence(dense, tmp_path, capsys, router, options, message):
    arguments = ["upcycle", str(dense), str(tmp_path / "moe"), f"--router={router}", *options]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "moe").exists()
