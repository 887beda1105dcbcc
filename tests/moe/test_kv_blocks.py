"""Caches in blocks keep what contiguous ones keep, wherever their blocks are."""

import pytest
import torch
from decode_steps import prompts

from moeyard.kernels.cpu import library
from moeyard.moe.batch import batch_of
from moeyard.moe.config.attention import AttentionConfig, LatentConfig
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.kv_blocks import BLOCK, BlockCache, KVBlocks, bytes_per_block
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.routers.hash import Hash
from moeyard.moe.routers.topk import TopK

NONE = library.Library(None, "left out")
KINDS = {
    "grouped": {},
    "window_and_sinks": {"window": 7, "window_layers": (0, 2), "sinks": True, "qk_norm": None},
    "latent": {"latent": LatentConfig(kv_rank=6, nope_dim=4, rope_dim=4, v_dim=5)},
}
KIND = pytest.mark.parametrize("kind", KINDS)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def decoder(kind: str, dtype: torch.dtype, router=None) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40,
        d_model=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4 if kind == "latent" else 2,
        head_dim=None if kind == "latent" else 10,
        max_positions=400,
        attention=AttentionConfig(**KINDS[kind]),
        moe=MoEConfig(num_experts=4, d_expert=16, router=router or TopK(k=2)),
    )
    return Decoder(config).to(dtype).eval()


def memory_of(model: Decoder, num_blocks: int, dtype=None) -> KVBlocks:
    specs = [layer.self_attn.cache_spec() for layer in model.layers]
    memory = KVBlocks(specs, num_blocks, torch.device("cpu"), dtype)
    for part in memory.tensors:
        part.fill_(
            torch.nan if part.is_floating_point() else 99
        )  # so that a position that was not written shows
    return memory


@torch.inference_mode()
def read(model: Decoder, texts, caches, chunks) -> list[torch.Tensor]:
    """Read texts in chunks, all texts together, and return their hidden rows."""
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for start, end in chunks:
        some = [ids[start:end] for ids in texts]
        rows = model(batch_of(some, caches)).hidden_TD.split([len(ids) for ids in some])
        for index, hidden in enumerate(rows):
            found[index].append(hidden)
    return [torch.cat(rows) for rows in found]


CHUNKS = [(0, 5), (5, 37), (37, 38), (38, 39), (39, 60)]
"""Within a block, across some, and single rows at both sides of nothing and of a border."""


@KIND
@DTYPE
def test_blocks_in_any_order_give_the_bits_of_contiguous_memory(kind, dtype, monkeypatch):
    monkeypatch.setattr(library, "_loaded", NONE)
    model, texts = decoder(kind, dtype), prompts(60, 43)
    expected = read(model, texts, [model.new_cache() for _ in texts], CHUNKS)
    memory = memory_of(model, 9)
    caches = [BlockCache(memory, 100) for _ in texts]
    caches[0].add_blocks([7, 0, 3])
    caches[1].add_blocks([2, 8, 5])
    caches[0].add_blocks([1])
    found = read(model, texts, caches, CHUNKS)
    for rows, whole in zip(found, expected, strict=True):
        assert torch.equal(rows, whole)
    assert [cache.length for cache in caches] == [60, 43]


@KIND
@DTYPE
def test_a_text_goes_on_after_blocks_that_another_one_filled(kind, dtype, monkeypatch):
    monkeypatch.setattr(library, "_loaded", NONE)
    model, (ids,) = decoder(kind, dtype), prompts(2 * BLOCK + 12)
    memory = memory_of(model, 6)
    first, second = BlockCache(memory, 60), BlockCache(memory, 60)
    first.add_blocks([4, 1, 0])
    shared = 2 * BLOCK
    chunks = [(0, shared), (shared, len(ids))]
    whole = read(model, [ids], [first], chunks)[0]
    memory.copy(1, 5)
    second.add_blocks([4, 5, 3])
    second.length = shared
    found = read(model, [ids], [second], chunks[1:])[0]
    assert torch.equal(found, whole[shared:])


def test_ids_are_kept_for_routers_that_read_the_one_before():
    router = Hash(table="bigram", k=1)
    model, (ids,) = decoder("grouped", torch.float32, router), prompts(30)
    memory = memory_of(model, 4)
    caches = [BlockCache(memory, 30), BlockCache(memory, 30)]
    caches[0].add_blocks([3, 0])
    read(model, [ids], caches[:1], [(0, 20), (20, 30)])
    assert caches[0].last_id() == ids[-1]
    assert [int(caches[0].id_at(at)) for at in range(30)] == ids.tolist()
    caches[1].keep_ids(ids[:16])
    caches[1].length = 16
    assert caches[1].last_id() == ids[15]


def test_a_cache_without_enough_blocks_refuses_and_stays_as_it_is():
    model, (ids,) = decoder("grouped", torch.float32), prompts(20)
    cache = BlockCache(memory_of(model, 4), 40)
    with pytest.raises(IndexError, match="4"):
        cache.add_blocks([0, 4])
    assert cache.capacity == 0
    cache.add_blocks([0])
    assert cache.capacity == BLOCK
    cache.reserve(BLOCK)
    with (
        pytest.raises(IndexError, match="20 positions in a cache with 1 blocks"),
        torch.inference_mode(),
    ):
        model(batch_of([ids], [cache]))
    assert cache.length == 0
    cache.add_blocks([1, 2])
    cache.length = 39
    with pytest.raises(IndexError, match="41 positions in a cache for 40"):
        cache.reserve(2)


@KIND
@pytest.mark.parametrize("stored", [None, "int8"])
def test_the_bytes_of_a_block_are_those_of_its_memory(kind, stored):
    memory = memory_of(decoder(kind, torch.bfloat16), 5, stored)
    assert 5 * bytes_per_block(memory.specs, stored) == sum(part.nbytes for part in memory.tensors)


@KIND
@pytest.mark.parametrize("kernels", [library.load(), NONE], ids=["cpp", "torch"])
def test_int8_is_close_to_the_models_type(kind, kernels, monkeypatch):
    monkeypatch.setattr(library, "_loaded", kernels)
    model, (ids,) = decoder(kind, torch.float32), prompts(60)
    expected = read(model, [ids], [model.new_cache()], CHUNKS)[0]
    memory = memory_of(model, 5, "int8")
    first, second = BlockCache(memory, 64), BlockCache(memory, 64)
    first.add_blocks([3, 1, 4, 0])
    found = read(model, [ids], [first], CHUNKS)[0]
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    memory.copy(4, 2)
    second.add_blocks([3, 1, 2, 0])
    second.length = 39
    assert torch.equal(read(model, [ids], [second], CHUNKS[-1:])[0], found[39:])
