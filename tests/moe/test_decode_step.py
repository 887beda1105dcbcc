"""Single new positions: through the C++ attention or torch's, alone or among others."""

import copy

import pytest
import torch
from decode_steps import hidden_by_steps, prompts

from moeyard.kernels.cpu import library
from moeyard.moe.batch import batch_of
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.routers.topk import TopK

NONE = library.Library(None, "left out")
BACKENDS = pytest.mark.parametrize("kernels", [library.load(), NONE], ids=["cpp", "torch"])
HEADS = [(4, 4, 8), (6, 2, 10), (8, 1, 4)]
"""Query heads, key/value heads, head width: one per group, some, more than a tile takes."""


def decoder(heads=(6, 2, 10), dtype=torch.float32) -> Decoder:
    num_heads, num_kv_heads, head_dim = heads
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40,
        d_model=24,
        num_layers=3,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=400,
        moe=MoEConfig(num_experts=4, d_expert=16, router=TopK(k=2)),
    )
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval()


@BACKENDS
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_positions_one_by_one_equal_the_whole_sequence(heads, kernels, monkeypatch):
    model, sequences = decoder(heads), prompts(90, 5, 71)
    with torch.inference_mode():
        whole = [model(batch_of([ids])).hidden_TD for ids in sequences]
    monkeypatch.setattr(library, "_loaded", kernels)
    for found, expected in zip(hidden_by_steps(model, sequences, 4), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_has_the_same_bits_alone_beside_others_and_beside_a_prompt(dtype):
    if library.load().functions is None:
        pytest.skip("torch's fp32 products depend on the number of rows")
    model, (ids, other, prompt) = decoder(dtype=dtype), prompts(30, 30, 50)
    alone = hidden_by_steps(model, [ids], 10)[0]
    assert torch.equal(hidden_by_steps(model, [other, ids], 10)[1], alone)
    cache, beside = model.new_cache(), model.new_cache()
    with torch.inference_mode():
        model(batch_of([ids[:10]], [cache]))
        rows = []
        for at in range(10, 30):
            chunk = prompt[2 * (at - 10) : 2 * (at - 10) + 2]
            out = model(batch_of([chunk, ids[at : at + 1]], [beside, cache])).hidden_TD
            rows.append(out[2:])
    assert torch.equal(torch.cat(rows), alone[10:])


def test_new_parameters_are_seen():
    model, sequences = decoder(), prompts(12)
    before = hidden_by_steps(model, sequences, 4)[0]
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(
            torch.zeros_like(model.layers[1].self_attn.o_proj.weight)
        )
    after = hidden_by_steps(model, sequences, 4)[0]
    with torch.inference_mode():
        expected = model(batch_of(sequences)).hidden_TD
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=2e-4, atol=2e-5)


def test_a_new_module_in_place_of_another_is_seen():
    model, sequences = decoder(), prompts(12)
    hidden_by_steps(model, sequences, 4)
    torch.manual_seed(7)
    attention = model.layers[1].self_attn
    attention.o_proj = type(attention.o_proj)(attention.o_proj.in_features, 24).eval()
    after = hidden_by_steps(model, sequences, 4)[0]
    with torch.inference_mode():
        expected = model(batch_of(sequences)).hidden_TD
    torch.testing.assert_close(after, expected, rtol=2e-4, atol=2e-5)


def test_a_sequence_without_rows_beside_a_single_row_changes_nothing():
    model, (ids,) = decoder(), prompts(9)
    alone = hidden_by_steps(model, [ids], 8)[0][8:]
    caches = [model.new_cache(), model.new_cache()]
    with torch.inference_mode():
        model(batch_of([ids[:3], ids[:8]], caches))
        found = model(batch_of([ids[:0], ids[8:]], caches)).hidden_TD
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def test_a_copy_uses_its_own_parameters():
    model, sequences = decoder(), prompts(12)
    before = hidden_by_steps(model, sequences, 4)[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(hidden_by_steps(twin, sequences, 4)[0], before)
