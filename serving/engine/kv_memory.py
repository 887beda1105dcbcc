"""The memory for keys and values of an engine: its size, and the caches of its sequences."""

import torch

from ...errors import ConfigError
from ...kernels.values.memory import is_out_of_memory
from ...moe.kv_blocks import BLOCK, BlockCache, KVBlocks, KVDtype
from ...moe.kv_cache import KVCacheSpec
from ...moe.models.decoder import Decoder
from ..experts.budget import parse_budget
from .jobs import Job


class KVMemory:
    """Blocks for the sequences of one decoder; the scheduler says which sequence has which."""

    def __init__(self, decoder: Decoder, num_blocks: int, dtype: KVDtype | None = None) -> None:
        device = decoder.embed_tokens.weight.device
        try:
            self._blocks = KVBlocks(specs_of(decoder), num_blocks, device, dtype)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"there is no memory for {num_blocks} blocks of keys and values; set a smaller "
                "kv-memory, max-model-len or max-num-seqs."
            ) from None

    def open(self, job: Job) -> BlockCache:
        """Return a cache that has the positions which a request has taken over."""
        cache = BlockCache(self._blocks, self._blocks.num_blocks * BLOCK)
        cache.add_blocks(job.blocks)
        if job.num_read:
            cache.keep_ids(torch.tensor(job.ids[: job.num_read]))
            cache.length = job.num_read
        return cache

    def copy(self, source: int, target: int) -> None:
        """Copy a block's keys and values to another block."""
        self._blocks.copy(source, target)


def specs_of(decoder: Decoder) -> list[KVCacheSpec]:
    """Return what each layer keeps per position."""
    cache = decoder.new_cache(1)
    return [cache.spec(layer) for layer in range(decoder.config.num_layers)]


def most_blocks(max_num_seqs: int, max_length: int) -> int:
    """Return the blocks with which no request of a full batch ever waits for one.

    One for each is added: the scheduler lets a request in only if those that run can go on.
    """
    return max_num_seqs * (-(-max_length // BLOCK) + 1)


def kv_bytes_of(text: str, block_bytes: int, max_num_seqs: int, max_length: int) -> int:
    """Return the bytes of a budget as people write it; :class:`ConfigError` for less than a block.

    A share is one of what a full batch of the longest texts takes.
    """
    most = most_blocks(max_num_seqs, max_length) * block_bytes
    num_bytes = parse_budget(text, most, "kv-memory")
    blocks_within(num_bytes, block_bytes)
    return num_bytes


def blocks_within(num_bytes: int, block_bytes: int) -> int:
    """Return how many blocks a budget holds; :class:`ConfigError` where it holds none."""
    if num_bytes < block_bytes:
        raise ConfigError(
            f"kv-memory is {num_bytes} bytes, but one block of {BLOCK} tokens takes {block_bytes}; "
            "give at least that."
        )
    return num_bytes // block_bytes
