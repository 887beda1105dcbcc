"""Drafted ids as rows of a forward. This file alone knows how rows of one text run together.

D model width.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from ....moe.adapters.adapter import Adapter
from ....moe.batch import batch_of
from ....moe.experts.core_channels import CoreChannels
from ....moe.kv_cache import CachePosition, KVCache
from ....moe.models.decoder import Decoder, DecoderOutput


@dataclass(frozen=True, slots=True)
class TextRows:
    """What a forward reads of one text."""

    cache: KVCache
    ids: tuple[int, ...]
    adapter: Adapter | None
    num_drafted: int = 0
    """How many of the last ids are drafted; the one before them is then the text's last id."""
    core: CoreChannels | None = None


def run_rows(decoder: Decoder, texts: Items[TextRows]) -> DecoderOutput:
    """Run the rows of all texts and advance their caches.

    A row that follows others of its text has the bits of a single step: each is a sequence of one
    row that ends before the next (:class:`.CachePosition`). Caches must have room.
    """
    ids: list[torch.Tensor] = []
    caches: list[KVCache] = []
    adapters: list[Adapter | None] = []
    cores: list[CoreChannels | None] = []
    for text in texts:
        ids_N = torch.tensor(text.ids)
        if text.num_drafted == 0:
            ids.append(ids_N)
            caches.append(text.cache)
            adapters.append(text.adapter)
            cores.append(text.core)
            continue
        text.cache.keep_ids(ids_N)
        ids += ids_N.split(1)
        start = text.cache.length
        caches += [CachePosition(text.cache, start + row) for row in range(len(ids_N))]
        adapters += [text.adapter] * len(ids_N)
        cores += [text.core] * len(ids_N)
    output: DecoderOutput = decoder(batch_of(ids, caches, adapters, cores))
    for text in texts:
        if text.num_drafted:
            text.cache.length += len(text.ids)
    return output
