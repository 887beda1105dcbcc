"""A row's bits depend on the tokens before it: not on chunks, other texts, or where blocks are."""

import random

import pytest
import torch
from decode_steps import prompts

from moeyard.kernels.cpu import library
from moeyard.moe.adapters.adapter import Adapter, LowRankLinear
from moeyard.moe.batch import batch_of
from moeyard.moe.blocks.robust import Robust
from moeyard.moe.config.attention import AttentionConfig, LatentConfig
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.kv_blocks import BLOCK, BlockCache, KVBlocks
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.exact_rows import rows_are_exact
from moeyard.moe.routers.cosine import Cosine
from moeyard.moe.routers.topk import TopK

NONE = library.Library(None, "left out")
pytestmark = pytest.mark.skipif(library.load().functions is None, reason=library.load().state)
FAMILIES = {
    "mixtral": ({"qk_norm": None}, {}, {}),
    "qwen3": ({}, {}, {"head_dim": 12}),
    "interleaved": ({"rope_interleaved": True}, {}, {}),
    "gpt_oss": (
        {
            "qk_norm": None,
            "qkv_bias": True,
            "o_bias": True,
            "sinks": True,
            "window": 70,
            "window_layers": (0,),
        },
        {"activation": "clamped_swiglu", "expert_bias": True},
        {"head_dim": 64, "num_heads": 8},
    ),
    "narrow_window": ({"window": 5}, {"router": Cosine(k=2)}, {}),
    "deepseek": (
        {"latent": LatentConfig(kv_rank=22, nope_dim=6, rope_dim=4, v_dim=10)},
        {"d_shared": 26, "shared_gate": True},
        {"dense_layers": (0,), "d_ff": 40, "num_kv_heads": 4, "head_dim": None},
    ),
    "robust": ({}, {"block": Robust()}, {}),
}
"""Attention, experts and sizes; panels of keys have 8 to 64 positions and windows cut them."""
FAMILY = pytest.mark.parametrize("family", FAMILIES)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def decoder(family: str, dtype: torch.dtype) -> Decoder:
    attention, experts, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = ModelConfig(
        **{
            "vocab_size": 40,
            "d_model": 26,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 10,
            "max_positions": 400,
        }
        | sizes,
        attention=AttentionConfig(**attention),
        moe=MoEConfig(**{"num_experts": 5, "d_expert": 18, "router": TopK(k=2)} | experts),
    )
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        if "_proj" in name and "bias" not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # so that attention matters
        elif "bias" in name or "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


class Blocks:
    """Hands out blocks in no order."""

    def __init__(self, model: Decoder, num_blocks: int, dtype=None) -> None:
        specs = [layer.self_attn.cache_spec() for layer in model.layers]
        self.memory = KVBlocks(specs, num_blocks, torch.device("cpu"), dtype)
        for part in self.memory.tensors:
            part.fill_(torch.nan if part.is_floating_point() else 99)  # nothing may be read early
        self._free = list(range(num_blocks))
        random.Random(3).shuffle(self._free)

    def cache(self, num_positions: int) -> BlockCache:
        cache = BlockCache(self.memory, num_positions)
        cache.add_blocks([self._free.pop() for _ in range(-(-num_positions // BLOCK))])
        return cache


@torch.inference_mode()
def read(model: Decoder, texts, caches, draw, adapters=None) -> list[torch.Tensor]:
    """Read texts in chunks of ``draw()`` rows each, together while several are unread."""
    rows: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(cache.length < len(ids) for cache, ids in zip(caches, texts, strict=True)):
        chunks = [i[c.length : c.length + draw()] for c, i in zip(caches, texts, strict=True)]
        hidden_TD = model(batch_of(chunks, caches, adapters)).hidden_TD
        for found, part in zip(rows, hidden_TD.split([len(c) for c in chunks]), strict=True):
            found.append(part)
    return [torch.cat(found) for found in rows]


def assert_exact(model: Decoder, new_cache, adapters=(None,) * 4) -> None:
    """Compare single rows, whole texts, and several texts in random chunks."""
    texts, chance = prompts(139, 40, 61, 139), random.Random(1)
    alone = []
    for ids, adapter in list(zip(texts, adapters, strict=True))[:2]:
        alone += read(model, [ids], [new_cache(len(ids))], lambda: 1, [adapter])
    for ids, adapter, expected in zip(texts, adapters, alone, strict=False):
        whole = read(model, [ids], [new_cache(len(ids))], lambda: 400, [adapter])[0]
        assert torch.equal(whole, expected)
    caches = [new_cache(len(ids)) for ids in texts]
    mixed = read(model, texts, caches, lambda: chance.choice((0, 1, 1, 2, 7, 16, 50)), adapters)
    for found, expected in zip(mixed, alone, strict=False):
        assert torch.equal(found, expected)
    assert not torch.equal(mixed[0], mixed[3])


@FAMILY
@DTYPE
def test_one_by_one_in_chunks_and_mixed_have_the_same_bits(family, dtype):
    model = decoder(family, dtype)
    assert rows_are_exact(model)
    assert_exact(model, Blocks(model, 80).cache)


@FAMILY
def test_blocks_have_the_bits_of_contiguous_memory(family):
    model, (ids,) = decoder(family, torch.bfloat16), prompts(139)
    expected = read(model, [ids], [model.new_cache()], lambda: 33)[0]
    assert torch.equal(read(model, [ids], [Blocks(model, 9).cache(139)], lambda: 50)[0], expected)


def adapter_of(model: Decoder, dtype: torch.dtype) -> Adapter:
    """Return an update of every linear layer of attention."""
    generator, linears = torch.Generator().manual_seed(5), {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("q_proj", "v_proj", "o_proj", "kv_b_proj"):
            rows, columns = module.weight.shape
            a_PI, b_OP = (
                torch.randn(*shape, generator=generator).to(dtype)
                for shape in ((4, columns), (rows, 4))
            )
            linears[module] = LowRankLinear(0.1 * a_PI, b_OP)
    return Adapter("some", linears, {}, in_attention=True)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", torch.bfloat16), ("gpt_oss", torch.bfloat16), ("deepseek", torch.float32)],
    ids=str,
)
def test_adapters_of_attention_change_no_bits_of_other_rows(family, dtype):
    model = decoder(family, dtype)
    adapters = [adapter_of(model, dtype), None, None, None]
    assert_exact(model, Blocks(model, 80).cache, adapters)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "deepseek"])
def test_int8_keys_and_values_are_exact_too_and_close_to_those_of_the_model(family):
    model = decoder(family, torch.bfloat16)
    assert_exact(model, Blocks(model, 80, "int8").cache)
    model, (ids,) = model.float(), prompts(139)
    expected = read(model, [ids], [model.new_cache()], lambda: 400)[0]
    found = read(model, [ids], [Blocks(model, 9, "int8").cache(139)], lambda: 400)[0]
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_says_where_rows_are_not_exact(monkeypatch):
    assert not rows_are_exact(decoder("qwen3", torch.float64))
    model = decoder("qwen3", torch.bfloat16)
    model.layers[1].self_attn.q_proj.float()
    assert not rows_are_exact(model)
    odd = decoder("deepseek", torch.bfloat16)
    odd.layers[1].self_attn.fits_kernels = False
    assert not rows_are_exact(odd)
    monkeypatch.setattr(library, "_loaded", NONE)
    assert not rows_are_exact(decoder("qwen3", torch.bfloat16))
